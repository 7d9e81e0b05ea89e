"""Networks that make examples: autoencoders, GANs and diffusion models."""

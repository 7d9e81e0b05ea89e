"""Keys of the families that learn to make their examples: autoencoders, GANs and diffusion models."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.base import Size
from configs.sections.family import ModelSection

from .stages import Activation, Norm

Widths = Annotated[tuple[Size, ...], Field(max_length=1000)]


class AutoencoderConfig(ModelSection):
    """An encoder and a decoder of rows or images, with a bottleneck between them."""

    default_task: ClassVar[str] = "reconstruction"

    family: str = "autoencoder"
    network: Literal["mlp", "conv"] = "mlp"
    """mlp: of rows, or of images as rows of pixels; conv: convolutional, of square images."""
    inputs: Size = 64
    """Numbers of an example: feature columns of a row, or channels * height * width of an image."""
    channels: Literal[1, 3] = 3
    """Channels of an image, as in data.images.channels."""
    hidden: Widths = (128,)
    """Widths of the encoder's hidden layers; with conv channels of its stages, each of which halves height and width.
    The decoder mirrors them."""
    activation: Activation = "relu"
    """Activation of the hidden layers."""
    norm: Norm = "none"
    """Normalisation before each activation."""
    latents: Size = 16
    """Numbers that an example is encoded as; with conv and vq, numbers at each pixel of the last stage."""
    bottleneck: Literal["plain", "vae", "vq"] = "plain"
    """plain: the latents as they are; vae: a normal distribution over them, at first the standard one
    (arXiv:1312.6114); vq: the nearest of model.codes learned vectors (arXiv:1711.00937)."""
    input_noise: float = Field(0.0, ge=0, le=1e6)
    """Standard deviation of noise that is added to the inputs, but not to what is to be reconstructed: a denoising
    autoencoder (Vincent et al., 2008)."""
    beta: float = Field(1.0, ge=0, le=1e6)
    """vae: weight of the KL divergence from the standard normal distribution (beta-VAE, Higgins et al., 2017)."""
    sparsity: Literal["none", "l1", "kl"] = "none"
    """plain: l1: the latents' absolute values are penalised; kl: the latents are between 0 and 1, and the divergence of
    each one's mean over a micro-batch from model.sparsity_target is penalised."""
    sparsity_weight: float = Field(0.1, ge=0, le=1e6)
    """Weight of the sparsity penalty."""
    sparsity_target: float = Field(0.05, gt=0, lt=1)
    """kl: what the mean of each latent should be."""
    contractive: float = Field(0.0, ge=0, le=1e6)
    """plain: weight of the squared Frobenius norm of the latents' Jacobian (Rifai et al., 2011), estimated with one
    random projection of each example."""
    codes: Size = 64
    """vq: vectors in the codebook."""
    commitment: float = Field(0.25, ge=0, le=1e6)
    """vq: weight of the latents' squared distance to their code, beside that of the code to them."""

    @property
    def most_zero(self) -> int:
        """The contractive penalty is a gradient, for which ZeRO-3 would have to keep the weights that it gathers."""
        return 2 if self.contractive else 3

    @property
    def side(self) -> int:
        """Height and width of an image of so many inputs and channels, rounded down."""
        return math.isqrt(self.inputs // self.channels)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.network == "conv":
            if not self.hidden:
                raise ValueError("model.hidden is empty: model.network=conv needs at least one stage")
            if self.channels * self.side**2 != self.inputs:
                raise ValueError(
                    f"model.inputs ({self.inputs}) is not model.channels ({self.channels}) times a square, which "
                    "model.network=conv requires: set model.inputs to channels * height * width of an image"
                )
            if self.side % 2 ** len(self.hidden):
                raise ValueError(
                    f"model.hidden has {len(self.hidden)} stages, each of which halves an image, but {self.side} pixels"
                    f" cannot be halved {len(self.hidden)} times: set data.images.size, or fewer stages"
                )
        for key in ("sparsity", "contractive"):
            if self.bottleneck != "plain" and getattr(self, key) not in ("none", 0):
                raise ValueError(f"model.{key} is for model.bottleneck=plain, not {self.bottleneck}: leave it out")
        return self


class DiffusionConfig(ModelSection):
    """A network that takes noise out of square images, and so makes them of noise."""

    default_task: ClassVar[str] = "denoising"

    family: str = "diffusion"
    network: Literal["unet", "dit"] = "unet"
    """unet: convolutional (arXiv:2006.11239); dit: a Transformer of patches (arXiv:2212.09748)."""
    image_size: Size = 32
    """Height and width of an image."""
    channels: Literal[1, 3] = 3
    """Channels of an image, as in data.images.channels."""
    classes: Size | None = None
    """Number of classes that images are conditioned on; None: they are unconditional."""
    width: Size = 64
    """unet: channels of the first level; dit: of a patch."""
    levels: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=16)] = (1, 2, 4)
    """unet: channels of each level, in units of model.width; each level but the first halves height and width, and the
    last one has attention."""
    depth: Annotated[int, Field(ge=1, le=1000)] = 2
    """unet: residual blocks of each level; dit: Transformer blocks."""
    heads: Annotated[int, Field(ge=1, le=1024)] = 4
    """Attention heads."""
    patch_size: Annotated[int, Field(ge=1, le=256)] = 2
    """dit: height and width of a patch."""
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """What the network predicts: epsilon: the noise; v: alpha * noise - sigma * image (arXiv:2202.00512); flow: noise -
    image, on the straight path between them (flow matching, arXiv:2210.02747)."""
    schedule: Literal["linear", "cosine"] = "linear"
    """epsilon and v: how the noise grows: linear in the variance added (arXiv:2006.11239), or cosine
    (arXiv:2102.09672)."""
    noise_steps: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """epsilon and v: levels of noise."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the examples that are trained without their label, for guidance."""
    guidance: float = Field(1.0, ge=0, le=1000)
    """Samples: guidance scale, from the prediction without the label to the one with it (arXiv:2207.12598); 1: the
    latter."""
    sampler: Literal["ddpm", "ddim", "heun"] = "ddim"
    """ddpm: adds noise after each step (arXiv:2006.11239); ddim: adds none (arXiv:2010.02502); heun: adds none, and
    corrects each step by a second prediction (arXiv:2206.00364)."""
    sample_steps: Annotated[int, Field(ge=1, le=10**5)] = 20
    """Steps from noise to a sample."""
    measure_samples: bool = False
    """Evaluations generate an image for each held-out one, and measure how similar the two sets are."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        parts = 2 ** (len(self.levels) - 1) if self.network == "unet" else self.patch_size
        if self.image_size % parts:
            key = "levels" if self.network == "unet" else "patch_size"
            raise ValueError(
                f"model.image_size ({self.image_size}) is not a multiple of {parts}, which model.{key} "
                f"requires: set model.image_size and data.images.size to a multiple, or change model.{key}"
            )
        width = self.width * (self.levels[-1] if self.network == "unet" else 1)
        if width % self.heads:
            raise ValueError(f"model.heads ({self.heads}) does not divide the {width} channels of attention")
        if self.network == "dit" and self.width % 4:
            raise ValueError(
                f"model.width ({self.width}) is not a multiple of 4, which the positions of patches require"
            )
        if self.network == "unet" and self.width % 2:
            raise ValueError(
                f"model.width ({self.width}) is odd, but half of the channels hold sines and half cosines of the time"
            )
        if self.guidance != 1 and (self.classes is None or not self.label_dropout):
            raise ValueError("model.guidance needs model.classes, and model.label_dropout above 0")
        if self.noise_steps < self.sample_steps and self.prediction != "flow":
            raise ValueError(
                f"model.sample_steps ({self.sample_steps}) exceeds model.noise_steps ({self.noise_steps}): set it to "
                f"{self.noise_steps} or fewer"
            )
        return self


class GanConfig(ModelSection):
    """A generator of square images and a discriminator between them and real ones, both convolutional (DCGAN,
    arXiv:1511.06434)."""

    default_task: ClassVar[str] = "adversarial"

    family: str = "gan"
    image_size: Size = 32
    """Height and width of an image."""
    channels: Literal[1, 3] = 3
    """Channels of an image, as in data.images.channels."""
    classes: Size | None = None
    """Number of classes that both networks are conditioned on; None: they are unconditional."""
    latents: Size = 64
    """Size of the latent vector."""
    generator_network: Literal["dcgan", "style"] = "dcgan"
    """dcgan: transposed convolutions, with BatchNorm; style: latents become, by an MLP, the means and deviations of the
    channels of each stage (StyleGAN, arXiv:1812.04948, without its noise), whatever else is in the batch."""
    mapping: Annotated[int, Field(ge=1, le=64)] = 4
    """style: layers of that MLP, as wide as the latents."""
    generator: Annotated[Widths, Field(min_length=1)] = (256, 128, 64)
    """Channels of its stages, smallest images first; each stage doubles height and width."""
    discriminator: Annotated[Widths, Field(min_length=1)] = (64, 128, 256)
    """Channels of its stages, each of which halves height and width."""
    discriminator_norm: Literal["none", "batch", "layer", "spectral"] = "spectral"
    """spectral: every matrix and convolution has spectral norm 1 (arXiv:1802.05957); batch, layer: before each
    activation but the first."""
    loss: Literal["minimax", "non_saturating", "wgan", "wgan_gp", "hinge"] = "non_saturating"
    """minimax and non_saturating: arXiv:1406.2661, equation 1 and section 3; wgan: Wasserstein distance with clipped
    weights (arXiv:1701.07875); wgan_gp: with a penalty on gradients (arXiv:1704.00028); hinge: arXiv:1705.02894."""
    clip: float = Field(0.01, gt=0, le=1e6)
    """wgan: largest absolute value of a weight of the discriminator."""
    gradient_penalty: float = Field(10.0, ge=0, le=1e6)
    """wgan_gp: weight of the penalty."""
    discriminator_lr: float | None = Field(None, gt=0, le=1e6)
    """Peak learning rate of the discriminator; None: optim.lr."""
    generator_lr: float | None = Field(None, gt=0, le=1e6)
    """Peak learning rate of the generator; None: optim.lr."""
    discriminator_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    """Discriminator steps per generator step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("generator", "discriminator"):
            stages = len(getattr(self, key))
            if self.image_size % 2**stages:
                raise ValueError(
                    f"model.image_size ({self.image_size}) is not a multiple of {2**stages}, which the {stages} "
                    f"stages of model.{key} require: set model.image_size and data.images.size to a multiple, or use "
                    "fewer stages"
                )
        if self.generator_network == "style" and self.image_size == 2 ** len(self.generator):
            raise ValueError(
                f"model.generator_network=style begins with images of 1 x 1, whose deviation is 0: use fewer than the "
                f"{len(self.generator)} stages of model.generator"
            )
        if self.loss == "wgan_gp" and self.discriminator_norm == "batch":
            raise ValueError(
                "model.discriminator_norm=batch mixes the images of a batch, but model.loss=wgan_gp penalises the "
                "gradient of each image by itself: set it to layer or none"
            )
        if self.loss == "wgan" and self.discriminator_norm == "spectral":
            raise ValueError("model.discriminator_norm=spectral undoes model.clip of model.loss=wgan: set it to none")
        return self

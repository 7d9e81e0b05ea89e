"""What is looked at beside the training loss: evaluation, samples, experts, profiles, plots."""

"""What is observed besides the training loss: evaluation, samples, expert usage, profiles, plots."""

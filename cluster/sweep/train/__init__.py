"""Train the trials of a sweep, and see how far they are."""

"""Train the trials of a sweep, and show their progress."""

"""What the pages show: all runs, one run, now, curves."""

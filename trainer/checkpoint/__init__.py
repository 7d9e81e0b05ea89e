"""Checkpoints: written, committed, read back in any topology, exported, and started from."""

"""Checkpoints: written, committed, read back in any topology, exported, and used for warm starts."""

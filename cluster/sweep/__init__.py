"""Sweeps: sets of runs planned, trained and evaluated together."""

"""Tokenizers: found, trained, run in a process of their own, and kept with a run."""

"""Tokenizers: found, made, run in a process of their own, and kept with a run."""

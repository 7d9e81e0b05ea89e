"""Crash-safe and private files."""

"""Runs and comparisons as HTML files that need no server: `muster dashboard --export`."""

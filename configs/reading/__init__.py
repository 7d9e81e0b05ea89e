"""Bounded parsing of untrusted input: YAML, JSON, Parquet page headers."""

"""Texts that are read without preparation, each with a label, and what such readers have in common."""

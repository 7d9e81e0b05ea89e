"""The record of a run: metrics and events, what is derived from them, and how they are shown on a terminal."""

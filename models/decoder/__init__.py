"""The decoder-only Transformer: its layers, its stages in a pipeline, and text generation."""

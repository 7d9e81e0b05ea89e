"""Labelled images in Parquet, as Hugging Face `datasets` writes them: read as they are, nothing to prepare."""

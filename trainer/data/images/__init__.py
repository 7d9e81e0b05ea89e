"""Labelled images in Parquet, as Hugging Face `datasets` writes them, read without preparation."""

"""Reading and writing Hugging Face folders."""

"""Rows of numbers in Parquet: a label, or numbers to predict, and features."""

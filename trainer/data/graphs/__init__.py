"""Graphs: read from Parquet, one in a row, and those of this machine's own Python."""

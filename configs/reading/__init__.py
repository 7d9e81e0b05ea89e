"""Read what anyone may have written, within bounds: YAML, JSON, the page headers of Parquet."""

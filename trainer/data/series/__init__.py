"""Series of observations at irregular times."""

"""Which runs there are, and a row of each, kept up to date."""

"""The commands of `muster` that are not about a sweep."""

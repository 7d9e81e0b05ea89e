"""The trials of a sweep, before anything is trained."""

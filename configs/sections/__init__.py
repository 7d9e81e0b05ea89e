"""The sections of a run's config, one file each."""

"""Device-specific implementations, each behind a function that chooses by device."""

"""Implementations for one kind of device, each behind a function that chooses by device."""

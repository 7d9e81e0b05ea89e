"""A run's folder and what belongs to it: config, plugins, notes, the code it was started from."""

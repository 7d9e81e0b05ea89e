"""A run's folder and what belongs to it: config, plugins, notes, the git commit it was started from."""

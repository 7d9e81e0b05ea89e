"""Health checks of machines, links and training itself, before the first step and during the run."""

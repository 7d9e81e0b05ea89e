"""A run's attempts: launching, supervising, and what follows a failure."""

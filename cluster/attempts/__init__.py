"""A run's attempts: started, supervised, and what follows a failure."""

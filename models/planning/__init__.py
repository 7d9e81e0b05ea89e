"""What a model costs in parameters, FLOPs, memory and time, from its config alone (no torch)."""

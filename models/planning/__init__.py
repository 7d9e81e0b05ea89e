"""What a model costs: parameters, FLOPs, memory and time, from its config alone (no torch)."""

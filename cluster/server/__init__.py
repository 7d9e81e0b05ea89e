"""The queue of a cluster: jobs submitted, packed, scheduled and listed."""

"""A cluster's server and its clients: jobs are submitted, packed, queued, scheduled and listed."""

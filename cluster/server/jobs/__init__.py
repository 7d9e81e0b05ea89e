"""The queue itself, in the cluster's server: its journal, its scheduler and the process that talks to Ray."""

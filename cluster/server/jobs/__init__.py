"""The job queue of a cluster's server: journal, scheduler, and the child process that talks to Ray."""

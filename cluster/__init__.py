"""Where runs are trained: Ray, a queue of jobs, sweeps, and the `muster` command."""

import configs  # noqa: F401  before anything that is installed, see configs.search_path

"""Whether machines, links and training itself are well: before the first step and during the run."""

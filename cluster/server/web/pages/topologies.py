"""A search of topologies as a process of its own: it takes seconds of a core."""

from trainer.processes.answering import answer_one

from .plan import topologies

SECONDS, MEMORY = 120, 2 << 30

if __name__ == "__main__":
    answer_one(topologies, SECONDS, MEMORY)

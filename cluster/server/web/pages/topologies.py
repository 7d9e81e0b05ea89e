"""A search of topologies as a process of its own: it takes seconds of a core. The question comes on stdin."""

import json
import resource
import sys

from trainer.files.plain_json import dump

from .plan import topologies

SECONDS, MEMORY = 120, 2 << 30
"""Of a core, and bytes."""

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.write(dump(topologies(json.load(sys.stdin))))

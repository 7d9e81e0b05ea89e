"""A process that answers one question within limits: JSON on stdin, the answer as JSON on stdout."""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from trainer.files.plain_json import dump


def answer_one(work: Callable[[dict[str, Any]], dict[str, Any]], seconds: int, memory: int) -> None:
    """Read the question, and write what `work` makes of it.

    Args:
        seconds: of a core, after which the process is ended.
        memory: bytes that it may take.
    """
    os.nice(10)  # runs may be trained on this machine
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.stdout.write(dump(work(json.load(sys.stdin))))

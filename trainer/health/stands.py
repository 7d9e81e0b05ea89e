"""Where a rank was in a hang, as read from the stacks that its watchdog saved."""

import contextlib
import json
import re
from pathlib import Path
from typing import NamedTuple

WAITING = ("/torch/distributed/", "/deepspeed/", "/trainer/health/clock.py", "/torch/cuda/streams.py")
"""Files whose frames mean a rank waits for others: clock.py wraps waits, in streams.py a host waits for its GPU."""
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class Stand(NamedTuple):
    """Where a rank was when its stacks were saved."""

    step: int
    phase: str
    frames: list[str]
    """Of the training thread, innermost first: `file:line in function`."""

    @property
    def waits(self) -> bool:
        return bool(self.frames) and any(part in self.frames[0] for part in WAITING)


def read_stand(path: Path) -> Stand | None:
    """Where a rank's training thread was, from its saved stacks; None if it could not save them."""
    with contextlib.suppress(OSError, ValueError):
        return stand_in(path.read_text(encoding="utf-8"))
    return None


def stand_in(text: str) -> Stand | None:
    """As `read_stand`, from the text of the file."""
    with contextlib.suppress(ValueError, LookupError, TypeError, StopIteration):
        head, *lines = text.splitlines()
        said = json.loads(head)
        begin = next(i for i, line in enumerate(lines) if said["thread"] in line)
        frames = []
        for line in lines[begin + 1 :]:
            if not (found := _FRAME.match(line)):
                break
            frames.append(f"{found[1]}:{found[2]} in {found[3]}")
        return Stand(said["step"], said["phase"], frames)
    return None

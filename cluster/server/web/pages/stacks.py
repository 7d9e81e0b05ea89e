"""Where the ranks of a run stood when it hung, by the stacks that they saved."""

import json
import re
from pathlib import Path
from typing import Any

from trainer.health.stands import stand_in
from trainer.record.lines import read_events
from trainer.record.terminal import visible

from .folders import below, opened, plain_files

STACKS = "stacks"
NAME = re.compile(r"attempt-(\d{1,9})-rank-(\d{1,9})\.txt")
MOST_RANKS = 2048
MOST_FILE = 1 << 18
"""Bytes of a rank's stacks that are read; of a training process with its threads they have some ten thousand."""
MOST_FRAMES, LONGEST_FRAME = 60, 300


def stacks(run_dir: Path) -> dict[str, Any]:
    """Of the newest attempt that saved some: its number, why, and each rank's stack, innermost frame first.

    A rank that could not say where it stood has no frames. Raises OSError.
    """
    try:
        with below(run_dir, STACKS) as folder:
            named = [
                (int(found[1]), int(found[2]), name)
                for name, size in plain_files(folder)
                if size and (found := NAME.fullmatch(name))
            ]
            attempt = max((number for number, *_ in named), default=None)
            ranks = [_rank(rank, _read(folder, name)) for number, rank, name in sorted(named) if number == attempt]
    except FileNotFoundError:
        attempt, ranks = None, []
    hangs = [event for event in read_events(run_dir) if event["event"] == "hang" and event["attempt"] == attempt]
    hang: Any = hangs[-1] if hangs else {}
    suspects = hang.get("suspects") if isinstance(hang.get("suspects"), list) else []
    for rank in ranks:
        rank["suspect"] = rank["rank"] in suspects
    reason = visible(str(hang["reason"])[:1000]) if hang else None
    return {"attempt": attempt, "reason": reason, "time": hang.get("time"), "ranks": ranks[:MOST_RANKS]}


def _read(folder: int, name: str) -> str:
    with opened(folder, name) as file:
        return file.read(MOST_FILE).decode(errors="replace")


def _rank(rank: int, text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"rank": rank, "host": None, "step": None, "phase": None, "waits": False, "frames": []}
    if stand := stand_in(text):
        head = json.loads(text.partition("\n")[0])
        found |= {
            "host": visible(str(head.get("host") or ""))[:200] or None,
            "step": stand.step if type(stand.step) is int and 0 <= stand.step <= 2**53 else None,
            "phase": visible(str(stand.phase))[:40],
            "waits": stand.waits,
            "frames": [visible(frame)[:LONGEST_FRAME] for frame in stand.frames[:MOST_FRAMES]],
        }
    return found

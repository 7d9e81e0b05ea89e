"""Work that takes seconds of a core: in a process of its own, one at a time, its answers kept by what they rest on."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from configs.reading.parse import clip

MOST_KEPT = 32
MOST_WAITING = 16
LONGEST = 64 << 20
"""Bytes of an answer."""
PATIENCE = 600.0
"""Seconds that a piece of work may take; it limits itself to fewer of a core."""


class Answer(NamedTuple):
    """What is known of a question at this moment."""

    found: dict[str, Any] | None
    """None: nothing yet. `error` in it: why it cannot be told."""
    at: float | None
    """Unix seconds when it was begun."""
    working: bool
    """It is not of now, and what is of now is being worked out."""


class Work(NamedTuple):
    place: Hashable
    rests_on: Hashable
    module: str
    question: Mapping[str, Any]


class Heavy:
    """Asks modules that are run as `python -m` and end with `trainer.processes.answering.answer_one`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        self._kept: OrderedDict[Hashable, tuple[Hashable, dict[str, Any], float]] = OrderedDict()
        self._waiting: OrderedDict[Hashable, Work] = OrderedDict()
        self._now: Work | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def ask(self, place: Hashable, rests_on: Hashable, module: str, question: Mapping[str, Any]) -> Answer:
        """What is known; if it is not of now, the work is begun, or waits for what was asked before.

        Args:
            place: what is asked; a later question of the same place takes the turn of one that waits.
            rests_on: what the answer follows from; as long as it is equal, nothing is asked again.
        """
        with self._lock:
            kept = self._kept.get(place)
            if kept is not None:
                self._kept.move_to_end(place)
                if kept[0] == rests_on:
                    return Answer(kept[1], kept[2], False)
            work = Work(place, rests_on, module, question)
            running = self._now is not None and (self._now.place, self._now.rests_on) == (place, rests_on)
            if not running and not self._closed:
                if place not in self._waiting and len(self._waiting) >= MOST_WAITING:
                    return Answer({"error": "too many calculations are waiting: try again in a minute"}, None, False)
                self._waiting[place] = work
                self._wanted.notify()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="heavy", daemon=True)
                    self._thread.start()
            return Answer(None, None, True) if kept is None else Answer(kept[1], kept[2], True)

    def close(self) -> None:
        """End what is being worked out; nothing is begun any more."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            if self._process is not None:
                self._process.kill()
            self._wanted.notify()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._closed:
                    self._wanted.wait()
                if self._closed:
                    return
                _, work = self._waiting.popitem(last=False)
                self._now = work
            began = time.time()
            found = self._answer(work)
            with self._lock:
                self._now = None
                self._kept[work.place] = work.rests_on, found, began
                self._kept.move_to_end(work.place)
                while len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)

    def _answer(self, work: Work) -> dict[str, Any]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", work.module]
        try:
            with self._lock:
                if self._closed:
                    return {"error": "the server ends"}
                self._process = process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
                )
            try:
                out, err = process.communicate(json.dumps(work.question).encode(), PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.wait()
            if process.returncode or len(out) > LONGEST:
                last = err.decode(errors="replace").strip().rpartition("\n")[2]
                return {"error": f"the calculation failed ({clip(last or f'exit code {process.returncode}')})"}
            return dict(json.loads(out))
        except subprocess.TimeoutExpired:
            return {"error": f"it was not calculated within {PATIENCE:.0f} s"}
        except (OSError, ValueError) as error:
            return {"error": f"the calculation failed ({clip(error)})"}
        finally:
            self._process = None

"""Progress of a preparation: a bar on a terminal, otherwise a line every ten seconds."""

import time

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from configs.units import byte_size, short
from trainer.record.terminal import Console

LINE_SECONDS = 10.0


class Meter:
    """Counts bytes read of `total` and tokens made; reports to stderr when `enabled`."""

    def __init__(self, total: int, enabled: bool):
        console = Console(stderr=True)
        self.total, self.tokens = total, 0
        self._stage = "read"
        self._lines = enabled and not console.is_terminal
        self._start = self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task(self._stage, total=total, tokens=0)

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def describe(self, stage: str) -> None:
        """Set the description of the current stage."""
        self._stage = stage
        self._bar.update(self._task, description=stage)

    def update(self, done: int) -> None:
        """Report that `done` bytes of the input have been read."""
        self._bar.update(self._task, completed=done, tokens=self.tokens)
        now = time.monotonic()
        if self._lines and now - self._last >= LINE_SECONDS:
            self._last = now
            rate = done / (now - self._start)
            self.say(
                f"{self._stage}: {done / max(self.total, 1):.0%} of {byte_size(self.total)}, "
                f"{short(self.tokens)} tokens, {byte_size(rate)}/s"
            )

    @staticmethod
    def say(line: str) -> None:
        """One line to stderr."""
        Console(stderr=True, soft_wrap=True).print(line)

"""Which samples each process of a run trained on, as it saw them, recorded by a plugin of the run."""

import json
import os
import sys
from pathlib import Path

import torch

SAMPLE_TOKENS = 32
"""Length of each sample's text, its end-of-text token included: a window of this length is exactly one sample."""
_NAME = "sample {:05d} "


def text_of(number: int) -> str:
    """A sample's text: its number, and letters that depend on it."""
    head = _NAME.format(number)
    letters = (chr(97 + (number * 7 + place * place) % 26) for place in range(SAMPLE_TOKENS - 1 - len(head)))
    return head + "".join(letters)


def number_of(tokens: list[int]) -> int:
    """The sample whose bytes these are (a byte is its own token); ValueError if they are none."""
    number = int(bytes(tokens[7:12]))
    if bytes(tokens[: SAMPLE_TOKENS - 1]).decode() != text_of(number):
        raise ValueError(f"no sample: {tokens}")
    return number


def plugin(path: Path, folder: Path) -> str:
    """Write a plugin that makes each process of a run keep a ledger in `folder`. Returns the value for `plugins:`."""
    path.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n\nimport ledger\n\n")
    with path.open("a") as file:
        file.write(f"ledger.keep({str(folder)!r})\n")
    return str(path)


def keep(folder: str) -> None:
    """Append a line for each step that this process finishes: attempt, step, rank, samples in order.

    The samples are read from the tokens that the model was given, the attempt from the run's record.
    """
    if "trainer.loop" not in sys.modules:  # this process checks the run; others train it
        return
    from trainer.run.folder import attempts
    from trainer.trainee import Trainee

    take = Trainee.step

    def step(self, batches, weight, riders, number):
        outcome = take(self, batches, weight, riders, number)
        if not hasattr(self, "attempt"):
            self.attempt = attempts(Path(folder).parent)
        rank = torch.distributed.get_rank()
        samples = [number_of(row) for batch in batches for row in batch.input_ids.tolist()]
        line = {"attempt": self.attempt, "step": number, "rank": rank, "samples": samples}
        path = Path(folder) / f"attempt-{self.attempt:03d}-rank-{rank:04d}-pid-{os.getpid()}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return outcome

    Trainee.step = step

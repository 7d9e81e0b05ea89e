"""Which samples each process of a run trained on, as it saw them: a plugin of the run writes it down."""

import json
import os
import sys
from pathlib import Path

import torch

SAMPLE_TOKENS = 32
"""Of each sample's text, its end of text included: a window of this length is one sample, whole."""
_NAME = "sample {:05d} "


def text_of(number: int) -> str:
    """A sample's text: its number, and letters of its own."""
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
    """Write a plugin that lets each process of a run keep a ledger in `folder`. Returns what `plugins:` takes."""
    path.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n\nimport ledger\n\n")
    with path.open("a") as file:
        file.write(f"ledger.keep({str(folder)!r})\n")
    return str(path)


def keep(folder: str) -> None:
    """Append a line for each step that this process finishes: attempt, step, rank, samples in their order.

    The samples are read from the tokens that the model was given, the attempt from the run's record.
    """
    if "trainer.loop" not in sys.modules:  # this process checks the run; others train it
        return
    from each_step import before_each_step

    from trainer import loop
    from trainer.run.folder import attempts

    build, now = loop.build_trainee, {"step": 0}
    before_each_step(lambda step: now.update(step=step))

    def build_trainee(*arguments, **keywords):
        trainee = build(*arguments, **keywords)
        run_dir, rank = Path(folder).parent, torch.distributed.get_rank()
        attempt, take = attempts(run_dir), trainee.step
        path = Path(folder) / f"attempt-{attempt:03d}-rank-{rank:04d}-pid-{os.getpid()}.jsonl"
        path.parent.mkdir(exist_ok=True)

        def step(batches, *more):
            outcome = take(batches, *more)
            samples = [number_of(row) for batch in batches for row in batch.input_ids.tolist()]
            line = {"attempt": attempt, "step": now["step"], "rank": rank, "samples": samples}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            return outcome

        trainee.step = step
        return trainee

    loop.build_trainee = build_trainee

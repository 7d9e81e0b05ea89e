"""What a run that went through faults must have in common with a clean one, read from its folder."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ledger import SAMPLE_TOKENS, number_of, text_of

from configs.sections.data import PrepareConfig
from trainer.checkpoint import manifest
from trainer.checkpoint.store import Reader
from trainer.data.prepare.prepare import prepare
from trainer.record.lines import read_events, read_metrics


def prepare_samples(folder: Path, count: int) -> Path:
    """Prepare `count` samples, some of them held out, as byte tokens: eight per row group, one per window."""
    raw = folder / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": text_of(number)}) + "\n" for number in range(count)))
    settings = PrepareConfig(tokenizer="bytes", held_out=0.2, row_group_tokens=8 * SAMPLE_TOKENS)
    prepare([str(raw)], folder / "samples", settings, workers=1, progress=False)
    return folder / "samples"


def samples_in(data: Path) -> list[int]:
    """The samples of the training split, in the order of its files."""
    tokens: list[int] = []
    for file in sorted(data.glob("train-*.parquet")):
        tokens += pq.read_table(file)["tokens"].to_pylist()
    return [number_of(tokens[start : start + SAMPLE_TOKENS]) for start in range(0, len(tokens), SAMPLE_TOKENS)]


def losses(run_dir: Path) -> list[tuple]:
    """The loss record: every value that is not a time."""
    keys = ("step", "loss", "eval_loss", "grad_norm", "aux_loss", "z_loss", "lr", "tokens", "sequences")
    return [tuple(record.get(key) for key in keys) for record in read_metrics(run_dir)]


def digest(run_dir: Path, step: int) -> str:
    """sha256 of the weights and optimizer states after a step."""
    reader, digest = Reader(manifest.folder(run_dir, step)), hashlib.sha256()
    for key in sorted(reader.states):
        for name in sorted(reader.manifest.shapes[key]):
            digest.update(f"{key}/{name}".encode())
            digest.update(reader.read(key, name).numpy().tobytes())
    return digest.hexdigest()


def attempts_from(run_dir: Path) -> dict[int, int]:
    """The step after which each attempt resumed."""
    found: dict[int, int] = {}
    for event in read_events(run_dir):
        if event["event"] == "attempt_started":
            found[event["attempt"]] = 0
        elif event["event"] == "resumed":
            found[event["attempt"]] = event["step"]
    return found


def rolled_back(run_dir: Path) -> list[int]:
    """For each attempt after the first, the number of committed checkpoints after the step that it resumed from."""
    found: list[int] = []
    saved: set[int] = set()
    starts = attempts_from(run_dir)
    for event in read_events(run_dir):
        if event["event"] == "checkpoint":
            saved.add(event["step"])
        elif event["event"] == "attempt_started" and event["attempt"] > 1:
            lost = {step for step in saved if step > starts[event["attempt"]]}
            found.append(len(lost))
            saved -= lost
    return found


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of all ledgers; the last one of a killed process may be incomplete."""
    found = []
    for path in sorted((run_dir / "ledger").iterdir()):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def order_of_use(run_dir: Path, world: int) -> list[int]:
    """The samples that made the final weights, in the order of the data, as the processes saw them.

    The last attempt to take a step counts: what an attempt did after the step that a later one resumed from was rolled
    back. For runs with one micro-batch per step.
    """
    kept = _kept(run_dir)
    assert [sorted(ranks) for _, ranks in sorted(kept.items())] == [list(range(world))] * len(kept)
    return [sample for _, ranks in sorted(kept.items()) for _, samples in sorted(ranks.items()) for sample in samples]


def use_by_step(run_dir: Path) -> list[list[int]]:
    """The sorted samples of each step that made the final weights: for runs whose number of processes changed."""
    return [
        sorted(sample for samples in ranks.values() for sample in samples)
        for _, ranks in sorted(_kept(run_dir).items())
    ]


def _kept(run_dir: Path) -> dict[int, dict[int, list[int]]]:
    """What each rank read for each step, in the attempt that counts."""
    starts = attempts_from(run_dir)
    kept: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for line in lines(run_dir):
        later = [start for attempt, start in starts.items() if attempt > line["attempt"]]
        if line["step"] <= min(later, default=line["step"]):
            assert line["rank"] not in kept[line["step"]], f"counted twice: {line}"
            kept[line["step"]][line["rank"]] = line["samples"]
    assert sorted(kept) == list(range(1, len(kept) + 1))
    return kept


def check_each_sample_once_per_epoch(used: list[int], samples: list[int]) -> None:
    """Check that each complete epoch has every sample once, and the incomplete last one none twice."""
    assert len(used) > 2 * len(samples)
    for start in range(0, len(used), len(samples)):
        epoch = used[start : start + len(samples)]
        if len(epoch) == len(samples):
            assert sorted(epoch) == sorted(samples)
        else:
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(samples)

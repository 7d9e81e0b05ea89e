"""Predictions that `muster sweep next` wrote, beside the losses that the runs reached."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as Rows

from configs import Config, ConfigError, load
from configs.reading.parse import clip
from configs.units import scientific
from models.planning.cost import training_flops_per_token
from models.scaling.scoring import Score, to_json
from trainer.files.own_files import no_link, read_bytes
from trainer.files.plain_json import dump
from trainer.record.lines import read_events, summary
from trainer.record.terminal import Console

PREDICTIONS, SCORES = "predictions.jsonl", "score.json"
MOST_PREDICTIONS = 16 << 20
"""Bytes of the first; a prediction takes some 20 kB."""


def keep_prediction(sweep_dir: Path, prediction: Mapping[str, Any], config: Path, run: str) -> None:
    """Append a prediction of a run to the sweep's predictions.jsonl.

    Args:
        prediction: `models.scaling.predictions.Prediction.summary()`.
        config: the run's config file.
    """
    line = {"time": time.time(), "run": run, "config": str(config.resolve()), **prediction}
    with open(sweep_dir / PREDICTIONS, "a", encoding="utf-8", opener=no_link) as file:
        file.write(dump(line) + "\n")


def score_runs(
    sweep_dir: Path, read: Callable[[Path], Config] = load, may_read: Callable[[Path], bool] = lambda path: True
) -> list[Score]:
    """Every prediction of predictions.jsonl; of several for one run, the last that was made before the run began.

    Args:
        read: a run's config from its file.
        may_read: whether a folder named in predictions.jsonl, which anyone may have written, may be read.

    Raises:
        ConfigError: there are none.
    """
    try:
        lines = read_bytes(sweep_dir / PREDICTIONS, MOST_PREDICTIONS).decode().splitlines()
    except FileNotFoundError:
        raise ConfigError(
            f"{sweep_dir} has no {PREDICTIONS}: `muster sweep next` predicts a run and writes its config, and "
            f"--max-budget C scores a fit of the smaller budgets on the larger ones"
        ) from None
    found: dict[str, Score] = {}
    for line in lines:
        try:
            each = _score_of(json.loads(line), read, may_read)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = ascii(clip(error, 200))
            raise ConfigError(f"{sweep_dir / PREDICTIONS} has a line that is not a prediction: {reason}") from None
        if each.status != "AFTERWARDS" or each.run not in found:
            found[each.run] = each
    return list(found.values())


def _score_of(record: Mapping[str, Any], read: Callable[[Path], Config], may_read: Callable[[Path], bool]) -> Score:
    path = Path(record["config"])
    config = read(path) if may_read(path.parent) and path.is_file() else None
    run_dir = _run_dir(path, config, str(record["run"]), may_read)
    status, loss, budget = "NEW", None, float(record["budget"])
    if run_dir is not None:
        run = summary(run_dir)
        started = [event["time"] for event in read_events(run_dir) if event["event"] == "attempt_started"]
        status = run["status"]
        if status == "FINISHED":
            loss = run["eval_loss"]
            if (run_dir / "config.yaml").is_file():
                budget = _flops(read(run_dir / "config.yaml"))
            if float(record.get("time", 0.0)) > started[0]:
                status = "AFTERWARDS"
    predicted = record["run_loss"]
    value, low, high = (float(predicted[key]) for key in ("value", "low", "high"))
    return Score(str(record["run"]), budget, value, low, high,
                 str(record["form"]), loss, status)  # fmt: skip


def _run_dir(path: Path, config: Config | None, run: str, may_read: Callable[[Path], bool]) -> Path | None:
    """Where the run is, or will be; None: only in folders that may not be read."""
    root = Path(config.run.root if config else "runs").expanduser()
    places = [root / run, path.parent.parent / run, path.parent / run]  # as its config says, or beside the sweep
    places = [place for place in places if may_read(place)]
    return next((place for place in places if (place / "config.yaml").is_file()), next(iter(places), None))


def _flops(config: Config) -> float:
    train = config.train
    return training_flops_per_token(config.model, train.seq_len) * train.steps * train.global_batch * train.seq_len


def show(found: list[Score], left_out: Sequence[tuple[str, str]] = ()) -> None:
    """Print a row for each prediction, and the reasons why runs have none."""
    table = Rows("run", box=None, pad_edge=False)
    for column in ("FLOPs", "predicted", "interval", "reached", "error", "inside"):
        table.add_column(column, justify="right")
    for each in found:
        came = each.status if each.loss is None else f"{each.loss:.4f}"
        error = "" if each.error is None else f"{each.error:+.2%}"
        inside = "" if each.inside is None else "yes" if each.inside else "NO"
        inside += " (predicted afterwards)" if each.status == "AFTERWARDS" else ""
        interval = f"{each.low:.4f} to {each.high:.4f}"
        table.add_row(each.run, scientific(each.budget), f"{each.predicted:.4f}", interval, came, error, inside)
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
    summary = to_json(found)
    if summary["finished"]:
        print(f"{summary['inside']} of {summary['finished']} inside the interval, mean absolute error "
              f"{summary['mean_absolute_error']:.2%}")  # fmt: skip
    for run, why in left_out:
        print(f"left out: {run}: {why}")

"""What was predicted beside what came: of runs that `muster sweep next` wrote, and of budgets left out of a fit."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table as Rows

from configs import Config, ConfigError, load
from models.cost import training_flops_per_token
from trainer.own_files import no_link
from trainer.plain_json import dump
from trainer.record import read_events, summary
from trainer.terminal import Console

from .cells import plain
from .refusal import Refusal
from .table import Table, budgets

PREDICTIONS, SCORES = "predictions.jsonl", "score.json"


class Score(NamedTuple):
    """One prediction; losses in nats per token."""

    run: str
    budget: float
    """Training FLOPs that the run spends, or spent."""
    predicted: float
    low: float
    high: float
    form: str
    loss: float | None
    """None: the run has not finished."""
    status: str
    """Of the run; "AFTERWARDS": the prediction was made when the run had ended, and is none."""

    @property
    def error(self) -> float | None:
        """(what came - what was predicted) / what was predicted."""
        return None if self.loss is None else self.loss / self.predicted - 1

    @property
    def inside(self) -> bool | None:
        """Whether the loss lies in the interval."""
        return None if self.loss is None else self.low <= self.loss <= self.high

    @property
    def counts(self) -> bool:
        return self.loss is not None and self.status == "FINISHED"


def keep_prediction(sweep_dir: Path, prediction: Mapping[str, Any], config: Path, run: str) -> None:
    """Append a prediction of a run to the sweep's predictions.jsonl.

    Args:
        prediction: `forecast.Prediction.summary()`.
        config: of the run.
    """
    line = {"time": time.time(), "run": run, "config": str(config.resolve()), **prediction}
    with open(sweep_dir / PREDICTIONS, "a", encoding="utf-8", opener=no_link) as file:
        file.write(dump(line) + "\n")


def score(sweep_dir: Path) -> list[Score]:
    """Every prediction of predictions.jsonl; of several for one run the last that was made before it began.

    Raises:
        ConfigError: there are none.
    """
    try:
        lines = (sweep_dir / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(
            f"{sweep_dir} has no {PREDICTIONS}: `muster sweep next` predicts a run and writes its config, and "
            f"--max-budget C holds a fit of the smaller budgets to the larger ones"
        ) from None
    found: dict[str, Score] = {}
    for line in lines:
        try:
            each = _score_of(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = ascii(" ".join(str(error).split()))[:200]
            raise ConfigError(f"{sweep_dir / PREDICTIONS} has a line that is no prediction: {reason}") from None
        if each.status != "AFTERWARDS" or each.run not in found:
            found[each.run] = each
    return list(found.values())


def _score_of(record: Mapping[str, Any]) -> Score:
    path = Path(record["config"])
    config = load(path) if path.is_file() else None
    run_dir = _run_dir(path, config, str(record["run"]))
    run = summary(run_dir)
    started = [event["time"] for event in read_events(run_dir) if event["event"] == "attempt_started"]
    status, loss = run["status"], None
    budget = float(record["budget"])
    if status == "FINISHED":
        loss = run["eval_loss"]
        if (run_dir / "config.yaml").is_file():
            budget = _flops(load(run_dir / "config.yaml"))
        if float(record.get("time", 0.0)) > started[0]:
            status = "AFTERWARDS"
    predicted = record["run_loss"]
    value, low, high = (float(predicted[key]) for key in ("value", "low", "high"))
    return Score(str(record["run"]), budget, value, low, high,
                 str(record["form"]), loss, status)  # fmt: skip


def _run_dir(path: Path, config: Config | None, run: str) -> Path:
    root = Path(config.run.root if config else "runs").expanduser()
    places = [root / run, path.parent.parent / run, path.parent / run]  # as it says, or beside the sweep
    return next((place for place in places if (place / "config.yaml").is_file()), places[0])


def _flops(config: Config) -> float:
    train = config.train
    return training_flops_per_token(config.model, train.seq_len) * train.steps * train.global_batch * train.seq_len


def score_left_out(
    table: Table, max_budget: float, form: str | None = None
) -> tuple[list[Score], list[tuple[str, str]]]:
    """Hold a fit of the budgets up to `max_budget` to the runs above it: each run, and the best of each budget.

    Returns:
        The scores; and (run, why) of what cannot be predicted.

    Raises:
        ConfigError: nothing lies above, or what lies below cannot be fitted.
    """
    from .fit import check, named
    from .forecast import Forecast

    above = table.c > 1.01 * max_budget
    if not above.any() or above.all():
        raise ConfigError(
            f"--max-budget {max_budget:g}: the sweep's runs spend {table.c.min():.3g} to {table.c.max():.3g} FLOPs, "
            f"and some should lie on each side"
        )
    held, below = table.take(above), table.without(above, f"over --max-budget {max_budget:g}")
    check(below)
    forecast = Forecast(below, named(form) if form else None)
    shapes = [kind.shape for kind in forecast.kinds]
    found: list[Score] = []
    left_out: list[tuple[str, str]] = []
    unique = held.extra.get("unique", np.full(len(held), np.inf))

    def add(name: str, row: int, shape: dict[str, float] | None) -> None:
        c, u, loss = float(held.c[row]), float(unique[row]), float(held.loss[row])
        try:
            if shape is None:
                each = forecast.at_budget(c, u)
            else:
                each = forecast.at_size(float(held.n[row]), float(held.d[row]), shape, u)
        except Refusal as refusal:
            if refusal.kind != "repeats":  # of the law as a whole
                raise
            left_out.append((name, str(refusal)))
        else:
            found.append(Score(name, c, *each.run_loss, each.form, loss, "FINISHED"))

    for i in range(len(held)):
        shape = {key: float(held.extra[key][i]) for key in shapes[0]}
        if shape in shapes:
            add(held.run[i], i, shape)
        else:
            left_out.append((held.run[i], "the smaller budgets have no model of its kind"))
    index = budgets(held)
    for level in range(int(index.max()) + 1):
        rows = np.flatnonzero(index == level)
        best = int(rows[held.loss[rows].argmin()])
        add(f"best of {plain(float(held.c[best]))}", best, None)
    return found, left_out


def to_json(found: list[Score]) -> dict[str, Any]:
    """Plain values, and how many of those that count lie inside."""
    counted = [each for each in found if each.counts]
    errors = [abs(each.error) for each in counted if each.error is not None]
    return {
        "scores": [each._asdict() | {"error": each.error, "inside": each.inside} for each in found],
        "finished": len(counted), "inside": sum(bool(each.inside) for each in counted),
        "mean_absolute_error": float(np.mean(errors)) if errors else None,
    }  # fmt: skip


def show(found: list[Score], left_out: Sequence[tuple[str, str]] = ()) -> None:
    """Print a row for each prediction, and why runs have none."""
    table = Rows("run", box=None, pad_edge=False)
    for column in ("FLOPs", "predicted", "interval", "came", "error", "inside"):
        table.add_column(column, justify="right")
    for each in found:
        came = each.status if each.loss is None else f"{each.loss:.4f}"
        error = "" if each.error is None else f"{each.error:+.2%}"
        inside = "" if each.inside is None else "yes" if each.inside else "NO"
        inside += " (predicted afterwards)" if each.status == "AFTERWARDS" else ""
        interval = f"{each.low:.4f} to {each.high:.4f}"
        table.add_row(each.run, plain(each.budget), f"{each.predicted:.4f}", interval, came, error, inside)
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)
    summary = to_json(found)
    if summary["finished"]:
        print(f"{summary['inside']} of {summary['finished']} inside the interval, mean absolute error "
              f"{summary['mean_absolute_error']:.2%}")  # fmt: skip
    for run, why in left_out:
        print(f"left out: {run}: {why}")

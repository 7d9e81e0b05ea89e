"""For scripts and notebooks: train a run, read runs as data frames, fit scaling laws and predict with them."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa

from configs import ConfigError, ExitCode, flatten, load
from configs.base import MOST_FLOAT
from configs.reading.parse import clip
from configs.sweep.definition import load_sweep
from models.scaling.fitting import Fits
from models.scaling.fitting import fit as fit_table
from models.scaling.predictions import Prediction
from models.scaling.predictions import predict as predict_from_table
from models.scaling.table import Table, read_table, table_of_columns
from trainer.record.lines import read_metrics
from trainer.record.progress import Follower, ProgressView
from trainer.record.summaries import summaries
from trainer.run.stop import request_stop

from .cli import ARGUMENTS
from .commands.runs import RUNS, run_folder, run_folders
from .sweep.results.collect import collect, loss_curves
from .sweep.results.fit_commands import tokens_to_read

__all__ = ["ConfigError", "Fits", "Prediction", "fit", "metrics", "predict", "runs", "train"]

CHOICE = re.compile(r"--(columns|where) (\w+=\.\.\.(?:,\w+=\.\.\.)*)(?: \(or \w+=\))?")
OPTION = re.compile(r"(?<![^\s(])--(columns|where|table|form|convention|max-budget|unique|root)\b( names)? ?")
"""Command-line options in a message: those whose argument is names, and any other."""
Source: TypeAlias = str | Path | pd.DataFrame
"""A sweep's YAML file, a CSV or Parquet file with one run per row, or such a table as a data frame."""


def train(
    config: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] | str = (),
    *,
    on_metrics: Callable[[dict[str, Any]], object] | None = None,
    fork: str | None = None,
) -> Path:
    """Train a run, or resume it, with `muster train` in a process of its own, whose output is printed.

    Args:
        config: a preset's name or a YAML file.
        overrides: {"train.steps": 100}, ["train.steps=100"], or one such string.
        on_metrics: called with each record as it is written, on a separate thread: records of steps have `loss`, those
            of evaluations `eval_loss`. A step that is repeated is reported again. If it raises, the run stops after the
            step in progress, with a checkpoint, and the error is raised here.
        fork: name of a new run that starts from the last checkpoint of `run.name`.

    Returns:
        The run's folder, also if the run was stopped; the same call then resumes it.

    Raises:
        ConfigError: a mistake in the arguments or the config.
        RuntimeError: the run failed.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    asked = load(config, overrides)
    run_dir = Path(asked.run.root).expanduser().resolve() / (fork or asked.run.name)
    told = _Told(run_dir, on_metrics)
    with Follower(run_dir, told):
        code, message = _muster("train", *(["--fork", fork] if fork else []), "--", str(config), *overrides)
    if told.error:
        raise told.error
    if code not in (ExitCode.FINISHED, ExitCode.STOPPED):
        raise ConfigError(message) if code == ExitCode.MISTAKE else RuntimeError(message)
    return run_dir


def _muster(*arguments: str) -> tuple[int, str]:
    """Run a `muster` command and return its exit code and last message. Ctrl-C reaches it too, and it is waited for."""
    message: list[str] = []
    interrupt = None
    # A new process for each run: one that has been part of one Ray cannot start another.
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "cluster.cli"],
        env={**os.environ, ARGUMENTS: json.dumps(arguments)},  # which may hold passwords
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout
        while True:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    message = [*([] if line.startswith("muster: ") else message), line][-20:]
                break
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt:
        raise interrupt
    return process.returncode, "".join(message).strip().removeprefix("muster: ")


class _Told(ProgressView):
    """Passes the metrics of a run to a function, until it raises."""

    def __init__(self, run_dir: Path, function: Callable[[dict[str, Any]], object] | None) -> None:
        super().__init__(0, tty=False)
        self.run_dir, self.function = run_dir, function
        self.error: Exception | None = None

    def metrics(self, record: dict[str, Any]) -> None:
        if self.function is None or self.error:
            return
        try:
            self.function(record)
        except Exception as error:
            self.error = error
            request_stop(self.run_dir)

    def event(self, record: dict[str, Any]) -> None:
        pass


def runs(root: str | Path = RUNS, keys: Sequence[str] | str = ()) -> pd.DataFrame:
    """The runs in a folder, one row each, indexed by name, as `trainer.record.lines.summary` describes them.

    A run whose record cannot be read is named on stderr and left out.

    Args:
        keys: config keys to add as columns, such as `optim.lr`; or a single one.

    Raises:
        ConfigError: root is not a folder, a run's config cannot be read, or it lacks a key.
    """
    keys = [keys] if isinstance(keys, str) else keys
    if root != RUNS and not Path(root).is_dir():
        raise ConfigError(f"root={clip(root, 200)}: no such folder")
    folders = {folder.resolve().name: folder for folder in run_folders(Path(root))}
    found = summaries(Path(root), list(folders.values()))
    for run in found if keys else ():
        folder = folders[run["name"]]
        values = flatten(load(folder / "config.yaml"))
        if unknown := [key for key in keys if key not in values]:
            raise ConfigError(f"{folder}: its config has no key {unknown[0]}")
        run |= {key: values[key] for key in keys}
    columns = ["name", "status", "reason", "step", "loss", "eval_loss", "tokens", "weight", "unit"]
    columns += ["attempts", "wall_time", "updated"]
    frame = pd.DataFrame(found, columns=[*columns, *keys]).set_index("name")
    frame["updated"] = pd.to_datetime(frame["updated"], unit="s", utc=True)
    return frame


def metrics(run: str | Path, root: str | Path = RUNS) -> pd.DataFrame:
    """The metrics of a run, one row per step, with those of an evaluation after it.

    metrics.jsonl also keeps steps that were repeated after a restart or a rollback: here only the last of each counts.

    Args:
        run: a name under `root`, or the run's folder.

    Raises:
        ConfigError: there is no such run.
    """
    steps: dict[int, dict[str, Any]] = {}
    with _by_argument():
        folder = run_folder(str(run), Path(root))
    for record in read_metrics(folder):
        row = steps.setdefault(record["step"], {})
        row |= {key: value for key, value in record.items() if key not in row}
    return pd.DataFrame(list(steps.values()), columns=None if steps else ["step", "loss"]).set_index("step")


def fit(source: Source, *, forms: str | Sequence[str] | None = None, seed: int = 0, **which: Any) -> Fits:
    """Fit every scaling law that the runs determine, as `muster sweep fit` does.

    Args:
        forms: names of laws, or one; None: all.
        which: columns, where and max_budget, see `predict`.

    Returns:
        Among others `best.coefficients`, `best.intervals`, and `refused`: why other laws cannot be relied on.

    Raises:
        ConfigError: no such file, column or law. Its subclass Refusal: no law can be fitted to these runs.
    """
    with _by_argument():
        table, curves, _ = _open(source, **which)
        return fit_table(table, [forms] if isinstance(forms, str) else forms, seed=seed, curves=curves)


def predict(
    source: Source, budget: float, *, form: str | None = None, unique: float | None = None, **which: Any
) -> Prediction:
    """The loss and the best size at a budget of training FLOPs, as `muster sweep predict` does.

    Args:
        form: name of a law; None: chosen from the runs.
        unique: unique tokens available; None: those of a sweep's own data, else unlimited.
        which: `columns` maps our names (n, d, c, loss, ...) to the file's; `where` maps columns to the value that rows
            must have, "" for an empty cell; `max_budget` leaves out runs with more training FLOPs.

    Returns:
        `loss` and `run_loss` in nats per token, `n` and `d`, each with `value`, `low` and `high`.

    Raises:
        ConfigError: as `fit`, or the budget is not a number above 0.
    """
    budget = _above_0("budget", budget)
    unique = unique if unique is None or unique == math.inf else _above_0("unique", unique)
    with _by_argument():
        table, _, there_are = _open(source, **which)
        return predict_from_table(table, budget, form, there_are if unique is None else unique)


def _above_0(name: str, value: Any) -> float:
    """A finite number above 0. Raises ConfigError."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= MOST_FLOAT:
        raise ConfigError(f"{name}={clip(repr(value), 80)}: should be a number above 0, at most {MOST_FLOAT:g}")
    return number


def _mapping(choice: re.Match[str]) -> str:
    names = ", ".join(f'"{pair.partition("=")[0]}": ...' for pair in choice[2].split(","))
    return f"{choice[1]}={{{names}}}"


def _argument(option: re.Match[str]) -> str:
    if option[2]:
        return f"{option[1]} names "
    return "" if option[1] == "table" else option[1].replace("-", "_") + "="


@contextmanager
def _by_argument() -> Iterator[None]:
    """Make messages name the arguments of a function instead of command-line options."""
    try:
        yield
    except ConfigError as error:
        told = CHOICE.sub(_mapping, str(error))
        told = OPTION.sub(_argument, told)
        error.args = (told,)
        raise


def _arrow(frame: pd.DataFrame) -> pa.Table:
    """A data frame as an Arrow table. Raises ConfigError for a column of mixed types, or two of the same name."""
    if twice := [name for name, again in zip(frame.columns, frame.columns.duplicated(), strict=True) if again]:
        raise ConfigError(f"the data frame has two columns named {twice[0]}")
    try:
        return pa.Table.from_pandas(frame.rename(columns=str), preserve_index=False)
    except pa.ArrowException as error:
        raise ConfigError(f"the data frame: {clip(error, 200)}") from None


def _open(
    source: Source,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    max_budget: float | None = None,
) -> tuple[Table, Table | None, float]:
    """The runs, points of their loss curves if the design needs them, and the unique tokens available."""
    sweep = curves = None
    if not isinstance(source, str | Path | pd.DataFrame):
        raise ConfigError(f"source={clip(repr(source), 80)}: should be the path of a file, or a data frame")
    if isinstance(source, pd.DataFrame):
        table = table_of_columns(_arrow(source), "the data frame", columns, where)
    elif Path(source).suffix in (".yaml", ".yml"):
        if columns or where:
            raise ConfigError(f"{source} is a sweep: columns and where are for tables of runs")
        sweep = load_sweep(source)
        table = collect(sweep).counted_as(sweep.count)
        if not len(table):
            raise ConfigError(f"{source}: no trial has finished yet; `muster sweep run {source}` trains them")
    else:
        table = read_table(source, columns, where)
    if max_budget is not None:
        table = table.up_to(_above_0("max_budget", max_budget))
    if sweep is not None and sweep.isoflop is None:
        curves = loss_curves(sweep.folder.resolve(), table)
    return table, curves, tokens_to_read(sweep, table)

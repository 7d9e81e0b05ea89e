"""`muster sweep fit`, `predict`, `plot`, `next`, `score`: from a sweep's runs, or any table, to a law and a run."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.runs import Json
from cluster.sweep.train.run_commands import Overrides, strict_json
from configs import ConfigError
from configs.base import MOST_FLOAT
from configs.sweep.definition import SweepConfig, load_sweep
from trainer.files.durable import replace_text
from trainer.files.own_files import require_own
from trainer.tracking.sweep import TRIALS

if TYPE_CHECKING:
    from models.scaling.table import Table

    from .plots import Prediction

MOST_BOOTSTRAPS, MOST_DRAWN = 100_000, 50_000_000
"""Most refits, and most refits times rows (8 bytes each)."""
File = Annotated[str | None, typer.Argument(metavar="[SWEEP.yaml]", help="The sweep's definition; or give --table.")]
TableFile = Annotated[
    Path | None, typer.Option("--table", metavar="FILE", help="CSV or Parquet file, one run per row.")
]
Columns = Annotated[
    str, typer.Option(metavar="n=...,d=...,c=...,loss=...", help="Which of the table's columns are n, d, c and loss.")
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=VALUE",
        help="Keep only rows with this value, or one of several (a,b); of a sweep's trials, variant=NAME.",
    ),
]
Convention = Annotated[
    str | None,
    typer.Option(help="How N is counted: total, active, without_embeddings, with_head; default: the sweep's count."),
]
FormName = Annotated[list[str] | None, typer.Option("--form", metavar="FORM", help="Fit only this form; repeatable.")]
PredictForm = Annotated[
    str | None,
    typer.Option(
        "--form",
        metavar="FORM",
        help="Fit this form to all runs; default: form crossed, fitted near the largest budgets.",
    ),
]
MaxBudget = Annotated[float | None, typer.Option(metavar="C", help="Leave out runs with more training FLOPs.")]
Unique = Annotated[
    float | None,
    typer.Option(
        metavar="U",
        help="Unique tokens available; training on more repeats them. Default: a sweep's own data, else unlimited.",
    ),
]
Kind = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="experts=E",
        help="Predict this kind of model; no run need be of it, if there are runs of four kinds. Also top_k=..., "
        "granularity=...; repeatable.",
    ),
]
Budget = Annotated[list[float] | None, typer.Option("--budget", metavar="C", help="Training FLOPs; repeatable.")]


def fit_sweep(
    file: File = None,
    overrides: Overrides = None,
    table: TableFile = None,
    columns: Columns = "",
    where: Where = None,
    convention: Convention = None,
    form: FormName = None,
    max_budget: MaxBudget = None,
    objective: Annotated[str, typer.Option(help="huber_log, least_squares_log or least_squares.")] = "huber_log",
    bootstraps: Annotated[int, typer.Option(metavar="N", help="Bootstrap refits for the intervals.")] = 1000,
    as_json: Json = False,
) -> None:
    """Fit scaling laws. Example: muster sweep fit --table runs.csv --columns n=params,d=tokens,c=flops,loss=val"""
    if not 0 <= bootstraps <= MOST_BOOTSTRAPS:
        raise ConfigError(f"--bootstraps {bootstraps}: should be 0 to {MOST_BOOTSTRAPS:,}")
    sweep, found = _table(file, overrides, table, columns, where, convention, max_budget)
    if bootstraps * len(found) > MOST_DRAWN:
        raise ConfigError(
            f"--bootstraps {bootstraps} times {len(found):,} rows is over {MOST_DRAWN:,}: lower it, or select fewer "
            "rows with --where"
        )
    from models.scaling.fitting import OBJECTIVES, fit

    if objective not in OBJECTIVES:
        raise ConfigError(f"--objective {objective}: should be one of {', '.join(OBJECTIVES)}")
    curves = None
    if sweep is not None and sweep.isoflop is None:
        from .collect import loss_curves

        curves = loss_curves(sweep.folder.resolve(), found)
    fits = fit(found, form, OBJECTIVES[objective], bootstraps, curves=curves)
    if form and fits.chosen is None:
        raise fits.reason
    told = strict_json(fits.summary())
    if sweep is not None:
        _send(sweep, [_keep(sweep, "fit.json", told + "\n")])
    if as_json:
        print(told)
    else:
        from .report import show_fits

        show_fits(fits)


def predict_sweep(
    file: File = None,
    overrides: Overrides = None,
    budget: Budget = None,
    n: Annotated[float | None, typer.Option("--n", help="Parameters of a given model, with --d.")] = None,
    d: Annotated[float | None, typer.Option("--d", help="Training tokens of a given model, with --n.")] = None,
    table: TableFile = None,
    columns: Columns = "",
    where: Where = None,
    convention: Convention = None,
    form: PredictForm = None,
    unique: Unique = None,
    kind: Kind = None,
    max_budget: MaxBudget = None,
    as_json: Json = False,
) -> None:
    """Predict loss and best size at a budget, with intervals. Example: muster sweep predict sweep.yaml --budget 1e20"""
    if (n is None) != (d is None) or not (budget or n):
        raise ConfigError("muster sweep predict needs --budget C (training FLOPs), or both --n and --d of a model")
    _positive(budget=budget, n=n, d=d, unique=unique)
    sweep, found = _table(file, overrides, table, columns, where, convention, max_budget)
    from models.scaling.fitting import check, named
    from models.scaling.predictions import Forecast

    check(found)
    forecast = Forecast(found, named(form) if form else None, unique=unique or tokens_to_read(sweep, found))
    shape = _shape(kind)
    predictions = [forecast.at_budget(each, shape=shape) for each in budget or ()]
    if n is not None and d is not None:
        shapes = [shape] if shape else [each.shape for each in forecast.kinds]
        predictions += [forecast.at_size(n, d, each) for each in shapes]
    if as_json:
        excluded = [{"run": run, "why": why} for run, why in found.excluded]
        told = {"predictions": [each.summary() for each in predictions], "excluded": excluded}
        print(strict_json(told | {"notes": list(found.notes)}))
    else:
        from .report import show_predictions

        show_predictions(predictions, found.notes)


def next_sweep(
    file: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="The sweep's definition.")],
    overrides: Overrides = None,
    *,
    budget: Annotated[float, typer.Option("--budget", metavar="C", help="Training FLOPs of the next run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Config file to write; default: in the sweep's folder."),
    ] = None,
    convention: Convention = None,
    form: PredictForm = None,
    unique: Unique = None,
    max_budget: MaxBudget = None,
) -> None:
    """Write the config of the best run for a budget. Example: muster sweep next sweep.yaml --budget 1e20"""
    _positive(budget=[budget])
    sweep, found = _table(file, overrides, None, "", None, convention, max_budget)
    assert sweep
    from cluster.sweep.design.next_run import Best, next_trial, write
    from cluster.sweep.train.progress import read_plan
    from models.scaling.fitting import check, named
    from models.scaling.predictions import Forecast

    from .score import PREDICTIONS, keep_prediction

    check(found)
    unique = unique or tokens_to_read(sweep, found)
    predicted = Forecast(found, named(form) if form else None, unique=unique).at_budget(budget)
    trial, notes = next_trial(sweep, Best.of(predicted), read_plan(sweep.folder)[1]["vocab_size"], budget)
    _require_own(sweep)
    path = out or sweep.folder / f"{trial.config.run.name}.yaml"
    write(trial, path, notes)
    keep_prediction(sweep.folder, predicted.summary(), path, trial.config.run.name)
    _send(sweep, [sweep.folder / PREDICTIONS])
    from .report import show_predictions

    show_predictions([predicted], found.notes)
    for note in notes:
        print(note)
    print(f"{path}: train it with `muster train {path}`, then `muster sweep score {file}`")


def plot_sweep(
    file: File = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Folder of the plots; default: plots/ in the sweep's folder."
        ),
    ] = None,
    budget: Budget = None,
    table: TableFile = None,
    columns: Columns = "",
    where: Where = None,
    convention: Convention = None,
    form: FormName = None,
    unique: Unique = None,
    max_budget: MaxBudget = None,
) -> None:
    """Plot a fit and the predictions of `next`, as PNG and HTML. Example: muster sweep plot sweep.yaml"""
    _positive(budget=budget)
    sweep, found = _table(file, overrides, table, columns, where, convention, max_budget)
    if out is None:
        if sweep is None:
            raise ConfigError("--table FILE needs --out FOLDER")
        _require_own(sweep)
        out = sweep.folder / "plots"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot create this folder ({error.strerror})") from None
    from models.scaling.fitting import Fits, Refusal, fit
    from models.scaling.predictions import Forecast

    from .plots import Prediction, draw

    try:
        fits = fit(found, form)
    except Refusal as refusal:  # the runs can still be drawn
        print(f"no law is drawn: {refusal}", file=sys.stderr)
        fits = Fits(found, {}, {}, None)
    else:
        if fits.chosen is None:
            print(f"no law is drawn: {fits.reason}", file=sys.stderr)
    marks, forecast = [], None
    try:
        forecast = Forecast(found, unique=unique or tokens_to_read(sweep, found))
        marks += [Prediction(each, *forecast.at_budget(each).loss) for each in budget or ()]
    except Refusal as refusal:
        print(f"no prediction is drawn: {refusal}", file=sys.stderr)
    if sweep is not None:
        marks += predicted_runs(sweep.folder)
    drawn = draw(fits, out, marks, forecast)
    for path in drawn:
        print(path)
    if sweep is not None and out.resolve().is_relative_to(sweep.folder.resolve()):
        _send(sweep, drawn)


def score_sweep(
    file: File = None,
    overrides: Overrides = None,
    max_budget: Annotated[
        float | None,
        typer.Option(metavar="C", help="Fit runs of up to this many training FLOPs, and score the larger ones."),
    ] = None,
    table: TableFile = None,
    columns: Columns = "",
    where: Where = None,
    convention: Convention = None,
    form: PredictForm = None,
    as_json: Json = False,
) -> None:
    """Compare predicted losses with those reached. Example: muster sweep score sweep.yaml"""
    from models.scaling.scoring import score, to_json

    from .score import SCORES, score_runs, show

    left_out: list[tuple[str, str]] = []
    if max_budget is None:
        if table is not None or file is None:
            raise ConfigError("give what to score: SWEEP.yaml, or --table FILE with --max-budget C")
        sweep: SweepConfig | None = load_sweep(file, overrides or ())
        assert sweep
        scores = score_runs(sweep.folder.resolve())
    else:
        sweep, found = _table(file, overrides, table, columns, where, convention, None)
        scores, left_out = score(found, max_budget, form)
    told = strict_json(to_json(scores) | {"excluded": [{"run": run, "why": why} for run, why in left_out]})
    if sweep is not None:
        _send(sweep, [_keep(sweep, SCORES, told + "\n")])
    if as_json:
        print(told)
    else:
        show(scores, left_out)


def predicted_runs(sweep_dir: Path) -> "list[Prediction]":
    """Predictions that `muster sweep next` made before the runs began, with the losses of those that have finished."""
    from .plots import Prediction
    from .score import PREDICTIONS, score_runs

    scores = score_runs(sweep_dir) if (sweep_dir / PREDICTIONS).exists() else []
    return [
        Prediction(each.budget, each.predicted, each.low, each.high, each.loss if each.counts else None)
        for each in scores if each.status != "AFTERWARDS"
    ]  # fmt: skip


def _table(
    file: str | None,
    overrides: list[str] | None,
    table: Path | None,
    columns: str,
    where: list[str] | None,
    convention: str | None,
    max_budget: float | None,
) -> "tuple[SweepConfig | None, Table]":
    """The sweep and a table of its runs, or None and the table of a file."""
    _positive(max_budget=max_budget)
    if (file is None) == (table is None):
        raise ConfigError("give one thing to fit: SWEEP.yaml, or --table FILE")
    from models.scaling.table import read_table

    sweep = None
    if table is not None:
        found = read_table(
            table, _pairs("--columns", columns.split(",") if columns else []), _pairs("--where", where or [])
        )
        if convention:
            found = found.counted_as(convention)
    else:
        from .collect import collect

        assert file
        sweep = load_sweep(file, overrides or ())
        found = collect(sweep, _variants(where)).counted_as(convention or sweep.count)
        if not len(found):
            raise ConfigError(f"{file}: no trial has finished yet; `muster sweep run {file}` trains them")
    if max_budget is not None:
        found = found.up_to(max_budget)
    return sweep, found


def _variants(where: list[str] | None) -> list[str] | None:
    """Those that `--where variant=A,B` names. Raises ConfigError if it names another column."""
    asked = _pairs("--where", where or [])
    names = asked.pop("variant", None)
    if asked:
        raise ConfigError(f"--where {next(iter(asked))}=...: of a sweep's trials, only variant=NAME can be selected")
    return names.split(",") if names else None


def _shape(kind: list[str] | None) -> dict[str, float]:
    """The properties of a kind of model, from `experts=16` or `experts=16,top_k=2`. Raises ConfigError."""
    import numpy as np

    from models.scaling.allocation import SHAPE
    from models.scaling.table import ALLOWED

    found: dict[str, float] = {}
    for name, text in _pairs("--kind", [each for given in kind or () for each in given.split(",")]).items():
        if name not in SHAPE:
            raise ConfigError(f"--kind {name}={text}: should be one of {', '.join(SHAPE)}")
        try:
            found[name] = float(text)
        except ValueError:
            raise ConfigError(f"--kind {name}={text}: {text!r} is not a number") from None
        if not ALLOWED[name](np.array([found[name]])).all():
            raise ConfigError(f"--kind {name}={text}: no model has that")
    return found


def _positive(**options: float | list[float] | None) -> None:
    """Raise ConfigError if a given option is not a number above 0, or is too large."""
    for name, value in options.items():
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if not 0 < each <= MOST_FLOAT:
                raise ConfigError(f"--{name.replace('_', '-')} {each:g}: should be above 0, at most {MOST_FLOAT:g}")


def tokens_to_read(sweep: SweepConfig | None, table: "Table") -> float:
    """Unique tokens for a sweep's next run: those of its runs' data if some run repeated them, otherwise infinite."""
    from models.scaling.allocation import repeats

    again = repeats(table)
    return float(table.extra["unique"][again].max()) if sweep is not None and again.any() else math.inf


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not (value.strip() or option == "--where"):
            raise ConfigError(f"{option} {text}: should be NAME=VALUE, such as n=params")
        if key.strip() in pairs:
            raise ConfigError(
                f"{option} names {key.strip()} twice"
                + (f": --where {key.strip()}=A,B takes the rows of both" if option == "--where" else "")
            )
        pairs[key.strip()] = value.strip()
    return pairs


def _send(sweep: SweepConfig, files: list[Path]) -> None:
    """Send files to the sweep's run in MLflow, if it has one."""
    from trainer.tracking.sweep import log_to_parent

    if missing := log_to_parent(sweep.folder, files):
        print(missing, file=sys.stderr)


def _require_own(sweep: SweepConfig) -> None:
    require_own(sweep.folder, without=(TRIALS,))


def _keep(sweep: SweepConfig, name: str, text: str) -> Path:
    _require_own(sweep)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / name
    replace_text(path, text)
    return path

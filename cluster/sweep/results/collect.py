"""The table that a fit reads, from the trials' own records: config.yaml, metrics.jsonl, events.jsonl."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.sweep.design.measures import Measures, measures_of
from cluster.sweep.design.sizes import conventions
from cluster.sweep.train.progress import read_plan
from cluster.sweep.train.trial_state import Ledger, Standing
from configs import Config, ConfigError, flatten, load
from configs.reading.parse import shortened
from configs.sweep.definition import SweepConfig
from models.planning.cost import has_formulas, parameters
from models.scaling.table import Table, usable
from trainer.record.lines import read_events, read_metrics
from trainer.tracking.sweep import TRIALS

SPACING = 1.25
"""Ratio of the FLOPs of neighbouring points of loss curves: more than `budgets` merges into one."""
SMOOTHED = 0.05
"""Fraction of a run's steps so far over which the training loss at a point of its curve is averaged."""


class Row(NamedTuple):
    """A finished trial."""

    name: str
    config: Config
    """Resolved."""
    loss: float
    """Held-out loss after the last step."""
    recipe: str
    unique: float
    """Unique training tokens available."""
    measures: Measures

    @property
    def tokens(self) -> float:
        """Training tokens; of a family that does not read tokens, examples."""
        train = self.config.train
        return float(train.steps) * train.global_batch * self.measures.units

    @property
    def flops(self) -> float:
        return self.measures.flops * self.tokens


def collect(sweep: SweepConfig, variants: Collection[str] | None = None) -> Table:
    """One row for each trial of the sweep's plan.json that has finished; the others are in `excluded`, with the reason.

    Of trials that differ only in their learning rate, the best stands for all: the rate counts as tuned.

    Args:
        variants: only the trials of these.

    Raises:
        ConfigError: the sweep never ran, or a file of it cannot be read; it has no such variant.
    """
    sweep_dir = sweep.folder.resolve()
    items, _ = read_plan(sweep_dir)
    known = dict.fromkeys(item.variant for item in items)
    if wrong := [name for name in variants or () if name not in known]:
        raise ConfigError(f"variant {shortened(wrong[0], 100)}: the sweep has {', '.join(known) or 'none'}")
    steps = {item.name: item.steps for item in items if variants is None or item.variant in variants}
    return collect_folder(sweep_dir, steps, sweep.count)


def collect_folder(
    sweep_dir: Path,
    steps: Mapping[str, int],
    count: str,
    read: Callable[[Path], Config] = load,
    measure: Callable[[str, Config], Measures] = lambda name, config: measures_of(config),
) -> Table:
    """As `collect`, of a sweep's folder.

    Args:
        steps: train.steps of each trial, by its name.
        count: how N is counted.
        read: a trial's config from its file.
        measure: the measures of a trial's model, by its name and config.
    """
    standings = Ledger(sweep_dir).standings(steps)
    rows, excluded = [], []
    for name, standing in standings.items():
        if why := _unusable(standing):
            excluded.append((name, why))
        else:
            rows.append(read_row(sweep_dir / TRIALS / name, standing, read, measure))
    excluded += [(row.name, "its FLOPs could not be counted") for row in rows if not row.flops]
    rows, worse = best_of_rates([row for row in rows if row.flops])
    return usable(table_of(rows, count, [*excluded, *worse]))


def read_row(
    run_dir: Path, standing: Standing, read: Callable[[Path], Config], measure: Callable[[str, Config], Measures]
) -> Row:
    """A finished trial. Raises ConfigError if its config cannot be read."""
    config = read(run_dir / "config.yaml")
    started = [event for event in read_events(run_dir) if event["event"] == "attempt_started"]
    inputs: list[Mapping[str, Any]] = started[-1].get("inputs", []) if started else []
    assert standing.eval_loss is not None
    measures = measure(run_dir.name, config)
    return Row(run_dir.name, config, standing.eval_loss, recipe_of(config, inputs), _unique(inputs), measures)


def recipe_of(config: Config, inputs: Sequence[Mapping[str, Any]]) -> str:
    """What must be equal for losses to be comparable, in words.

    Args:
        inputs: of `attempt_started`: the data and tokenizers, with their digests.
    """
    train, optim = config.train, config.optim
    read = [f"{'data' if each['kind'] == 'training' else 'tokenizer'} {str(each['digest'])[:8]}" for each in inputs]
    held_out = f"{train.eval_sequences} held-out examples"
    if config.task == "language_modelling":
        held_out = f"{train.eval_sequences} held-out sequences of {train.seq_len} tokens"
    family = [] if has_formulas(config.model) else [f"family {config.model.family}"]
    return ", ".join([*family, optim.name, optim.schedule, train.precision, held_out, *read])


def table_of(rows: Sequence[Row], count: str, excluded: Sequence[tuple[str, str]] = ()) -> Table:
    """The rows as columns; N in every convention, of which `count` is the table's."""
    models = [row.config.model for row in rows]
    counted = [conventions(row.measures.counts) for row in rows]
    names = tuple(conventions(parameters(Config().model)))
    counts = {name: _array(each[name] for each in counted) for name in names}
    tokens = _array(row.tokens for row in rows)
    sparse = [has_formulas(model) and model.is_moe for model in models]
    extra = {
        "experts": _array(model.num_experts if moe else 1 for model, moe in zip(models, sparse, strict=True)),
        "top_k": _array(model.top_k if moe else 1 for model, moe in zip(models, sparse, strict=True)),
        "active_ratio": _array(
            model.top_k / model.num_experts if moe else 1.0 for model, moe in zip(models, sparse, strict=True)
        ),
        "granularity": _array(
            (model.intermediate_size or 0) / (model.expert_size or 1) if moe else 1.0
            for model, moe in zip(models, sparse, strict=True)
        ),
    }
    unique = _array(row.unique for row in rows)
    if (tokens > unique).any():
        extra["unique"] = np.minimum(tokens, unique)
    return Table(
        n=counts[count], d=tokens, c=_array(row.flops for row in rows), loss=_array(row.loss for row in rows),
        convention=count, counts=counts, extra=extra, run=tuple(row.name for row in rows),
        recipe=tuple(row.recipe for row in rows), excluded=tuple(excluded),
    )  # fmt: skip


def best_of_rates(rows: Sequence[Row]) -> tuple[list[Row], list[tuple[str, str]]]:
    """The best of the rows that differ only in optim.lr, and why the others are left out."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        keys = {key: value for key, value in flatten(row.config).items() if key not in ("run.name", "optim.lr")}
        groups.setdefault(repr(sorted(keys.items(), key=lambda pair: pair[0])), []).append(row)
    best = [min(group, key=lambda row: row.loss) for group in groups.values()]
    worse = [
        (row.name, f"optim.lr={row.config.optim.lr:g}: {kept.name} has the same model and tokens and a lower loss")
        for kept, group in zip(best, groups.values(), strict=True)
        for row in group
        if row is not kept
    ]
    return best, worse


def loss_curves(sweep_dir: Path, table: Table, read: Callable[[Path], Config] = load) -> Table:
    """Points of the finished trials' training losses at common FLOPs, for Hoffmann et al.'s approach 1.

    A point before a run's end was reached before the learning rate had decayed, so these losses are higher than those
    of runs that end there (arXiv:2203.15556, section 3.1, therefore trains several lengths of each size).

    Args:
        table: of `collect`.
        read: a trial's config from its file.
    """
    if not len(table):
        return table
    ends = 0.2 * table.c.min(), table.c.max()
    grid = np.geomspace(*ends, 1 + round(np.log(ends[1] / ends[0]) / np.log(SPACING)))
    found: list[tuple[int, float, float]] = []
    for i, name in enumerate(table.run):
        steps = [record for record in read_metrics(sweep_dir / TRIALS / name) if record.get("loss") is not None]
        last = read(sweep_dir / TRIALS / name / "config.yaml").train.steps
        at = np.array([record["step"] for record in steps]) / last * table.c[i]
        losses = np.array([record["loss"] for record in steps])
        for c in grid[(grid >= 0.1 * table.c[i]) & (grid <= table.c[i] * (1 + 1e-9))]:
            reached = int((at <= c * (1 + 1e-9)).sum())
            if reached:
                first = min(int((at <= c * (1 - SMOOTHED)).sum()), reached - 1)
                found.append((i, c, float(losses[first:reached].mean())))
    rows = np.array([i for i, _, _ in found], dtype=np.int64)
    c, loss = np.array([each[1] for each in found]), np.array([each[2] for each in found])
    picked = table.take(rows)
    share = c / picked.c
    return Table(
        n=picked.n, d=picked.d * share, c=c, loss=loss, convention=picked.convention, counts=picked.counts,
        extra={key: values for key, values in picked.extra.items() if key != "unique"}, run=picked.run,
        recipe=picked.recipe, notes=("training losses on the way, smoothed",),
    )  # fmt: skip


def _unusable(standing: Standing) -> str:
    if standing.state == "finished":
        return "" if standing.eval_loss is not None else "its held-out loss is not a number"
    reason = f": {' '.join(standing.reason.split())[:200]}" if standing.reason else ""
    at = f" at step {standing.step}" if standing.step else ""
    return f"{standing.state}{at}{reason}"


def _unique(inputs: Sequence[Mapping[str, Any]]) -> float:
    """Training tokens of all sources; infinite if the record does not say."""
    found = [each["profile"].get("splits", {}).get("train", {}).get("tokens") for each in inputs if each["profile"]]
    known = [float(tokens) for tokens in found if tokens]
    return sum(known) if known else float("inf")


def _array(values: Any) -> np.ndarray:
    return np.array(list(values), dtype=np.float64)

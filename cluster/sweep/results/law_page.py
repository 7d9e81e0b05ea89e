"""What a page shows of a sweep's law, as JSON: by the functions of `muster sweep fit`, `predict`, `score` and `next`.

It is a process of its own (`python -m cluster.sweep.results.law_page`): a fit takes seconds of a core. Whoever made the
sweep's folder may not be whoever looks at it, so nothing outside of the roots is read, and nothing that a config names
is run.
"""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.sweep.design.measures import Measures, counted_measures, measures_of, units_of
from cluster.sweep.design.next_run import Best, next_trial
from cluster.sweep.train.progress import Books, books, read_mapping, read_plan
from cluster.sweep.train.trial_state import Ledger
from configs import Config, ConfigError, preset_names
from configs.load import from_dict, refuse_outside
from configs.sections.family import DECODER
from configs.sweep.definition import SweepConfig, nested, sweep_from_dict
from configs.units import scientific
from models.planning.cost import has_formulas
from models.scaling.allocation import Kind, kinds
from models.scaling.curves import curve
from models.scaling.fitting import Fits, check, fit
from models.scaling.predictions import Forecast, Prediction
from models.scaling.scoring import score, to_json
from models.scaling.table import Table, budgets
from trainer.processes.answering import answer_one
from trainer.tracking.sweep import SWEEP, TRIALS

from .collect import collect_folder, loss_curves
from .fit_commands import MOST_BOOTSTRAPS, MOST_DRAWN, tokens_to_read
from .score import PREDICTIONS, score_runs
from .valleys import POINTS, is_dense, known_valleys, lowest, name, parabola

SECONDS, MEMORY = 300, 4 << 30
"""Of a core, and bytes: no sweep's fit takes as much."""
BEYOND = 3.0
"""Lines go on to this factor beyond the largest budget, or the one that is predicted."""


class Folder:
    """A sweep's folder, read without following what it names.

    Args:
        roots: folders of runs, resolved; what lies in none of them is not read.
    """

    def __init__(self, path: Path, roots: Sequence[Path]) -> None:
        self.path, self.roots = path, roots
        for each in (path, path / TRIALS):
            if each.is_symlink() or not each.is_dir():
                raise ConfigError(f"{each.name} is not a folder")
        self.items, plan = read_plan(path)
        self.vocab_size: int = plan["vocab_size"]
        self.sweep: SweepConfig = sweep_from_dict(read_mapping(path / SWEEP), SWEEP)

    def may_read(self, folder: Path) -> bool:
        found = folder.resolve()
        return any(found.is_relative_to(root) for root in self.roots)

    def read(self, path: Path) -> Config:
        """The config of a run whose family has formulas."""
        config = self.read_trial(path)
        if not has_formulas(config.model):
            raise ConfigError(f"the family {config.model.family} is counted by its plugin, which is not loaded here")
        return config

    def read_trial(self, path: Path) -> Config:
        """The config of a trial; of a plugin's family as it stands there, as the plugin is not loaded to check it."""
        if not self.may_read(path):
            raise ConfigError(f"{path.name} is in none of the folders of runs")
        tree = read_mapping(path)
        model = tree.get("model")
        if isinstance(model, Mapping) and model.get("family", DECODER) != DECODER:
            tree.pop("plugins", None)
        refuse_outside(tree, path.name)
        return from_dict(tree, where=f"{path.parent.name}/{path.name}")

    def measure(self, trial: str, config: Config) -> Measures:
        """Of a plugin's family as the sweep's plan has them."""
        if has_formulas(config.model):
            return measures_of(config)
        item = next(item for item in self.items if item.name == trial)
        counts = item.parameters
        embedding = counts["total"] - counts["without_embeddings"]
        return counted_measures(counts["total"], embedding, item.flops / item.tokens, units_of(config))

    def table(self) -> Table:
        trials = {item.name: item.steps for item in self.items}
        there = {trial: steps for trial, steps in trials.items() if not (self.path / TRIALS / trial).is_symlink()}
        return collect_folder(self.path, there, self.sweep.count, self.read_trial, self.measure)

    def books(self) -> Books:
        """Where the devices' time went."""
        return books(Ledger(self.path))


def told(folder: Folder, budget: float | None = None, max_budget: float | None = None) -> dict[str, Any]:
    """What is known of a sweep's law.

    Args:
        budget: training FLOPs that are asked for; None: one step of the sweep's own beyond its largest.
        max_budget: leave out runs of more training FLOPs.

    Raises:
        ConfigError: the folder cannot be read, or no run is left.
    """
    whole, time = folder.table(), folder.books()._asdict()
    if not len(whole):
        none = {"rows": 0, "missing": "no trial has finished yet", "excluded": _excluded(whole), "budgets": []}
        return none | {"time": time}
    table = whole if max_budget is None else whole.up_to(max_budget)
    levels = _levels(whole)
    found: dict[str, Any] = {
        "rows": len(table), "convention": table.convention, "budgets": levels, "max_budget": max_budget,
        "notes": list(table.notes), "excluded": _excluded(table), "kinds": _curves(table), "missing": "",
        "time": time,
    }  # fmt: skip
    try:
        check(table)
        fits = _fits(folder, table)
    except ConfigError as error:
        found["missing"] = str(error)
        return found | {"score": _scores(folder, whole, levels, None)}
    asked = budget or _next(_levels(table))
    found |= {"laws": _laws(fits), "chosen": fits.chosen, "no_law": "" if fits.chosen else str(fits.reason)}
    found["budget"] = asked
    predicted = None
    try:
        forecast = Forecast(table, unique=tokens_to_read(folder.sweep, table))
        predicted = forecast.at_budget(asked)
        found["prediction"] = predicted.summary() | {"kind": _named(predicted.shape), "rivals": [
            each.summary() | {"kind": _named(each.shape)} for each in predicted.rivals
        ]}  # fmt: skip
    except ConfigError as error:
        found["no_prediction"] = str(error)
    found["frontier"] = _frontier(fits, asked)
    found["next"] = _next_trial(folder, predicted, asked) if predicted else None
    return found | {"score": _scores(folder, whole, levels, max_budget)}


def _fits(folder: Folder, table: Table) -> Fits:
    bootstraps = min(1000, MOST_BOOTSTRAPS, MOST_DRAWN // len(table))
    curves = None if folder.sweep.isoflop else loss_curves(folder.path, table, folder.read_trial)
    return fit(table, bootstraps=bootstraps, curves=curves)


def _levels(table: Table) -> list[float]:
    """The budgets of a table, smallest first."""
    index = budgets(table).level
    return [float(np.exp(np.log(table.c[index == level]).mean())) for level in range(int(index.max()) + 1)]


def _next(levels: Sequence[float]) -> float:
    """As far above the largest budget as that is above the one before it, in two digits."""
    step = levels[-1] / levels[-2] if len(levels) > 1 else 2.0
    return float(f"{levels[-1] * step:.2g}")


def _excluded(table: Table) -> list[dict[str, str]]:
    return [{"run": run, "why": why} for run, why in table.excluded]


def _named(shape: Mapping[str, float]) -> str:
    return name(Kind(dict(shape), np.zeros(1), np.zeros(0, dtype=np.int64)))


def _curves(table: Table) -> list[dict[str, Any]]:
    """Of each kind of models, and each budget: its runs, and the parabola through them with its lowest point."""
    (index, common), found = budgets(table), []
    for kind in kinds(table):
        known, of_kind = known_valleys(table.take(kind.rows)), []
        for level in np.unique(index[kind.rows]):
            rows = kind.rows[index[kind.rows] == level]
            low = lowest(table, rows, known) if common else None
            x, y = parabola(table, rows, low) if low else (np.empty(0), np.empty(0))
            runs = [
                {"run": table.run[i], "n": table.n[i], "d": table.d[i], "c": table.c[i], "loss": table.loss[i]}
                for i in sorted(rows.tolist(), key=lambda i: table.n[i])
            ]
            of_kind.append({
                "budget": float(np.exp(np.log(table.c[rows]).mean())), "runs": runs, "x": x, "y": y,
                "low": {key: getattr(low, key) for key in ("c", "n", "d", "loss", "std")} if low else None,
            })  # fmt: skip
        found.append({"name": name(kind), "dense": is_dense(kind), "budgets": of_kind})
    return found


def _laws(fits: Fits) -> list[dict[str, Any]]:
    """Every form and approach with its errors, the chosen one first, those that are refused last."""
    found: list[dict[str, Any]] = []
    for form, each in fits.fits.items():
        summary = each.summary()
        found.append({
            "name": form, "source": summary["source"], "error": summary["cross_validation"],
            "residual": summary["residual"], "refused": str(fits.refused.get(form, "")),
            "coefficients": [
                {"name": key, "value": value, "interval": each.intervals.get(key)}
                for key, value in each.coefficients.items()
            ],
        })  # fmt: skip
    found += [
        {"name": form, "source": "", "error": None, "residual": None, "refused": str(why), "coefficients": []}
        for form, why in fits.refused.items() if form not in fits.fits
    ]  # fmt: skip
    for label, power in (("approach2", fits.approach2), ("approach1", fits.approach1)):
        if power is not None:
            n, d = (power.n, power.d) if label == "approach2" else power  # type: ignore[union-attr,misc]
            exponents = [{"name": key, "value": law.exponent, "interval": None} for key, law in (("a", n), ("b", d))]
            found.append({"name": label, "source": "", "error": None, "residual": None, "refused": "",
                          "coefficients": exponents})  # fmt: skip
    return sorted(found, key=lambda law: (law["name"] != fits.chosen, bool(law["refused"]), law["error"] or math.inf))


def _frontier(fits: Fits, furthest: float) -> list[dict[str, Any]]:
    """The lowest loss of each kind by the chosen form over training FLOPs, with 95% of the bootstrap."""
    if fits.chosen is None:
        return []
    table, found = fits.table, []
    least, most = float(table.c.min()), float(table.c.max())
    inside = np.geomspace(least, most, POINTS)
    c = np.concatenate([inside, np.geomspace(most, max(most, furthest) * BEYOND, 9)[1:]])
    for kind in kinds(table):
        line = curve(fits.best, table, kind, c)
        sound = len(line.loss_samples) and np.isfinite(line.loss_samples).any(axis=0).all()
        low, high = np.nanpercentile(line.loss_samples, [2.5, 97.5], axis=0) if sound else (None, None)
        found.append({"name": name(kind), "c": c, "loss": line.loss, "n": line.n, "low": low, "high": high})
    return found


def _scores(folder: Folder, table: Table, levels: Sequence[float], max_budget: float | None) -> dict[str, Any]:
    """Predictions beside what came: of runs that `muster sweep next` wrote, and of budgets held back."""
    found: dict[str, Any] = {"predicted": None, "held_back": None, "why": ""}
    if os.path.lexists(folder.path / PREDICTIONS):
        try:
            found["predicted"] = to_json(score_runs(folder.path, folder.read, folder.may_read))
        except ConfigError as error:
            found["why"] = str(error)
    until = max_budget if max_budget is not None and max_budget < levels[-1] / 1.01 else None
    if until is None and len(levels) > 3:
        until = levels[-2]
    if until is not None:
        try:
            scores, left_out = score(table, until)
            out = [{"run": run, "why": why} for run, why in left_out]
            found["held_back"] = to_json(scores) | {"until": until, "excluded": out}
        except ConfigError as error:
            found["why"] = found["why"] or str(error)
    return found


def _next_trial(folder: Folder, predicted: Prediction, budget: float) -> dict[str, Any]:
    """What `muster sweep next` would write, as far as it can be known without reading the sweep's base."""
    path = folder.path / SWEEP
    command = f"muster sweep next {shlex.quote(str(path))} --budget {budget:g}".replace("e+", "e")
    found: dict[str, Any] = {"command": command, "config": None, "notes": [], "why": ""}
    try:
        _refuse_outside(folder.sweep)
        trial, notes = next_trial(folder.sweep, Best.of(predicted), folder.vocab_size, budget)
    except ConfigError as error:
        return found | {"why": str(error)}
    config, model = trial.config, trial.resolved.model
    keys = ("num_layers", "hidden_size", "num_heads", *(("num_experts", "top_k") if model.is_moe else ()))
    shape = {key: getattr(model, key) for key in keys}
    used = {
        "run.name": config.run.name, **{f"model.{key}": value for key, value in shape.items()},
        "train.steps": config.train.steps, "train.global_batch": config.train.global_batch,
        "train.seq_len": config.train.seq_len, "optim.lr": config.optim.lr, "optim.warmup": config.optim.warmup,
    }  # fmt: skip
    return found | {
        "config": used, "notes": list(notes), "parameters": trial.counts.total, "tokens": trial.tokens,
        "flops": scientific(trial.flops),
    }  # fmt: skip


def _refuse_outside(sweep: SweepConfig) -> None:
    """Raise ConfigError if the next trial's config would be made of other files than presets, or of code."""
    if sweep.base not in preset_names():
        raise ConfigError(f"its shape follows from base={Path(sweep.base).name}, which is not read here")
    for keys in (sweep.set, *(variant.set for variant in sweep.variants.values()), dict.fromkeys(sweep.axes)):
        tree = nested(keys)
        refuse_outside(tree, SWEEP)
        if "plugins" in tree or "init_from" in (tree.get("train") or {}):
            raise ConfigError("its shape follows from plugins or another model's folder, which are not read here")


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As `told`, of {"folder", "roots", "budget", "max_budget"}; what cannot be told is {"error": why}."""
    try:
        folder = Folder(Path(asked["folder"]), [Path(root) for root in asked["roots"]])
        return told(folder, asked["budget"], asked["max_budget"])
    except ConfigError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{Path(str(error.filename or '')).name}: {error.strerror or error}"}


if __name__ == "__main__":
    answer_one(answer, SECONDS, MEMORY)

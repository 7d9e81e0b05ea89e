"""Fit scaling laws to a table of runs: `fit(read_table("runs.csv"))`. Needs numpy; neither Ray nor torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs import ConfigError, counted

from .allocation import kinds, repeats
from .forms.dense import Approach3, Array, Columns, DataConstrained, Form, Gadre, Kaplan
from .forms.newton import HUBER_LOG, LEAST_SQUARES, Objective
from .forms.solve import Solution, refit, solve, solve_parts
from .forms.sparse import MOE_FORMS
from .isoflop import Approach2, PowerLaw, approach2, best_approach1
from .refusal import Refusal, edge, refused
from .table import Table, budgets, read_table, resampled

__all__ = [
    "FORMS", "HUBER_LOG", "LEAST_SQUARES", "OBJECTIVES", "Fit", "Fits", "Objective", "Refusal", "Table", "fit",
    "fit_form", "read_table", "rolling_origin",
]  # fmt: skip

FORMS: dict[str, Form] = {form.name: form for form in (Approach3(), Kaplan(), Gadre(), DataConstrained(), *MOE_FORMS)}
OBJECTIVES = {
    "huber_log": HUBER_LOG,
    "least_squares_log": Objective("log", np.inf),
    "least_squares": LEAST_SQUARES,
}
LEAST_BUDGETS = 3
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Fit:
    """One form, fitted."""

    form: Form
    solution: Solution
    coefficients: dict[str, float]
    """Under the literature's names."""
    intervals: dict[str, tuple[float, float]]
    """95%, by the bootstrap over runs."""
    samples: Array
    """Parameters of the bootstrap's converged refits, shape (at most BOOTSTRAPS, J + G)."""
    objective: Objective
    residual: float
    """Root mean square of ln L - ln loss."""
    cross_validation: float | None = None
    """Root mean square of ln L - ln loss on held-out budgets, rolling origin; None: too few budgets."""

    @property
    def undetermined(self) -> Refusal | None:
        """Why its coefficients cannot be relied on, if so."""
        return edge(self.form, self.solution.at_bound)

    def schwarz(self, rows: int) -> float:
        """Schwarz' criterion (1978) of a fit to so many rows, up to a constant: the lower the better."""
        return 2 * rows * float(np.log(self.residual)) + self.form.size * float(np.log(rows))

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        solution = self.solution
        return self.coefficients | {
            "source": self.form.source,
            "objective": str(self.objective),
            "objective_value": solution.value,
            "converged": solution.converged,
            "gradient": solution.gradient,
            "basins": {"agreeing": solution.agreeing, "polished": solution.candidates},
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "bootstraps": len(self.samples),
            "residual": self.residual,
            "cross_validation": self.cross_validation,
            "at_bound": list(solution.at_bound),
        }


@dataclass(frozen=True)
class Fits:
    """All that was fitted to a table."""

    table: Table
    fits: dict[str, Fit]
    refused: dict[str, Refusal]
    """By form or approach: why it was not fitted, or cannot be relied on."""
    chosen: str | None
    """Of the forms not refused, one with nearly the lowest error on held-out budgets; with too few budgets, by Schwarz'
    criterion. None: all were refused."""
    approach1: tuple[PowerLaw, PowerLaw] | None = None
    """Power laws of N and D."""
    approach1_of: str = ""
    """What the best run of each budget was chosen by: final losses, or loss curves."""
    approach2: Approach2 | None = None
    kinds: dict[str, "Fits"] = field(default_factory=dict)
    """For a table with several kinds of models, the fits of each kind alone, by its experts."""

    @property
    def best(self) -> Fit:
        """The chosen form. Raises Refusal with its `reason` if there is none."""
        if self.chosen is None:
            raise self.reason
        return self.fits[self.chosen]

    @property
    def reason(self) -> Refusal:
        """Why no form is chosen, if none is: the reasons of all forms."""
        forms = {name: why for name, why in self.refused.items() if name not in ("approach1", "approach2")}
        return refused(forms, "no form is reliable")

    def summary(self) -> dict[str, Any]:
        """For `--json`: every form's coefficients, how it was fitted, what was left out."""
        found: dict[str, Any] = {name: each.summary() for name, each in self.fits.items()}
        if self.approach1:
            a, b = (law.exponent for law in self.approach1)
            found["approach1"] = {"a": a, "b": b, "of": self.approach1_of}
        if self.approach2:
            found["approach2"] = self.approach2.summary()
        return {
            "convention": self.table.convention,
            "rows": len(self.table),
            "budgets": sorted(float(np.exp(np.log(self.table.c[b]).mean())) for b in _groups(self.table)),
            "chosen": self.chosen,
            "refused": {name: {"kind": each.kind, "why": str(each)} for name, each in self.refused.items()},
            "excluded": [{"run": run, "why": why} for run, why in self.table.excluded],
            "notes": list(self.table.notes),
            "kinds": {label: each.summary() for label, each in self.kinds.items()},
        } | found


def fit(
    table: Table,
    forms: Sequence[str] | None = None,
    objective: Objective = HUBER_LOG,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    curves: Table | None = None,
) -> Fits:
    """Fit every form that the table has the columns for, and choose one by its error on held-out budgets.

    Args:
        forms: names from FORMS; None: all that the table has the columns for.
        bootstraps: refits for the coefficients' intervals.
        curves: points of the runs' loss curves at common FLOPs, for approach 1 if the runs do not end at common
            budgets.

    Returns:
        The fits, even if every form is refused: then the reasons, and approaches 1 and 2.

    Raises:
        Refusal: mixed recipes or too few budgets.
        ConfigError: no such form.
    """
    check(table)
    for name in forms or ():
        named(name)
    fits: dict[str, Fit] = {}
    left_out: dict[str, Refusal] = {}
    unasked: dict[str, Refusal] = {}  # what the table has no columns for
    for name in forms or FORMS:
        try:
            fits[name] = fit_form(FORMS[name], table, objective, bootstraps, seed)
            if undetermined := fits[name].undetermined:
                left_out[name] = undetermined
        except Refusal as refusal:
            (left_out if forms or refusal.kind != "columns" else unasked)[name] = refusal
    alone = {}
    for kind in kinds(table) if len(_shapes(table)) > 1 and not forms else ():
        label = " ".join(f"{name}={value:g}" for name, value in kind.shape.items())
        try:
            own = table.take(kind.rows)
            points = None if curves is None else curves.take(np.isin(curves.run, own.run))
            alone[label] = fit(own, None, objective, bootstraps, seed, points)
        except Refusal as refusal:
            left_out[label] = refusal
    if not fits:
        left_out |= unasked
    found1, found2, of = None, None, ""
    if len(_shapes(table)) == 1:
        try:
            found1, of = best_approach1(table, curves)
        except Refusal as refusal:
            left_out["approach1"] = refusal
        try:
            found2 = approach2(table)
        except Refusal as refusal:
            left_out["approach2"] = refusal
    sound = {name: each for name, each in fits.items() if name not in left_out}
    errors = {name: each.cross_validation for name, each in sound.items() if each.cross_validation is not None}
    chosen = None
    if errors:  # of the forms within 5% of the lowest error, the one with the fewest coefficients
        near = [name for name, error in errors.items() if error <= 1.05 * min(errors.values())]
        chosen = min(near, key=lambda name: fits[name].form.size)
    elif sound:
        chosen = min(sound, key=lambda name: fits[name].schwarz(len(table)))
    return Fits(table, fits, left_out, chosen, found1, of, found2, alone)


def fit_form(
    form: Form,
    table: Table,
    objective: Objective = HUBER_LOG,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> Fit:
    """Fit one form.

    Raises:
        Refusal: the table lacks a column or a spread that the form needs, or has fewer rows than it has coefficients.
    """
    x, solution = solved(form, table, objective)
    samples = np.empty((0, form.size))
    intervals: dict[str, tuple[float, float]] = {}
    if bootstraps:
        weights = resampled(table, bootstraps, np.random.default_rng(seed))
        samples, converged = refit(form, x, table.loss, weights, solution.parameters, objective)
        samples = samples[converged]
        each = [form.coefficients(sample) for sample in samples]
        for name in each[0] if each else ():
            with np.errstate(invalid="ignore"):  # of samples that overflow, as at the edge of an exponent
                low, high = np.percentile([one[name] for one in each], [2.5, 97.5])
            intervals[name] = (float(low), float(high))
    residual = form.log_loss(solution.parameters[None], x)[0] - np.log(table.loss)
    return Fit(
        form, solution, form.coefficients(solution.parameters), intervals, samples, objective,
        residual=float(np.sqrt((residual**2).mean())),
        cross_validation=rolling_origin(form, table, objective, solution.parameters),
    )  # fmt: skip


def solved(form: Form, table: Table, objective: Objective = HUBER_LOG) -> tuple[Columns, Solution]:
    """The columns that a form needs, and its optimum. Raises Refusal as `fit_form`."""
    x = _columns(form, table)
    if len(table) < form.size + 1:
        there_are = f"but there {'is' if len(table) == 1 else 'are'} {len(table)}"
        raise Refusal("few_rows", f"{form.name} needs more than {form.size} runs, {there_are}")
    solution = solve(form, x, table.loss, objective)
    if not solution.converged:
        # If a term has vanished from the form, its exponent is undetermined and the search for it does not converge.
        raise edge(form, solution.at_bound) or Refusal(
            "convergence", f"{form.name}: the fit did not converge (scaled gradient {solution.gradient:.1g})"
        )
    return x, solution


def rolling_origin(
    form: Form, table: Table, objective: Objective = HUBER_LOG, start: Array | None = None
) -> float | None:
    """Root mean square error in ln L, predicting each budget from the fit to all smaller ones; budgets weigh the same.

    Args:
        start: the optimum of all rows, shape (J + G,); None: it is searched for.

    Returns:
        None if fewer than two budgets could be held out.
    """
    x, level = _columns(form, table), budgets(table).level
    origins = [
        k for k in range(LEAST_BUDGETS - 1, int(level.max()) + 1) if (level < k).sum() >= form.size + 1
    ]  # fmt: skip
    if len(origins) < 2:
        return None
    if start is None:
        start = solve(form, x, table.loss, objective).parameters
    before = level < np.array(origins)[:, None]
    parameters, _ = solve_parts(form, x, table.loss, before, start, objective)
    errors = form.log_loss(parameters, x) - np.log(table.loss)
    held = [float((each[level == k] ** 2).mean()) for k, each in zip(origins, errors, strict=True)]
    return float(np.sqrt(np.mean(np.nan_to_num(held, nan=np.inf))))


def named(form: str) -> Form:
    """A form of FORMS. Raises ConfigError if there is none of that name."""
    if form not in FORMS:
        raise ConfigError(f"--form {form}: no such form; known are {', '.join(FORMS)}")
    return FORMS[form]


def check(table: Table) -> None:
    """Raise Refusal if no law can be fitted: mixed recipes, too few budgets."""
    recipes = sorted(set(table.recipe))
    if len(recipes) > 1:
        raise Refusal(
            "mixed_recipes",
            f"the runs come from {len(recipes)} recipes "
            f"({', '.join(each or '(empty)' for each in recipes[:3])}), whose losses cannot be compared: choose "
            "one with --where recipe=..." + ("" if all(recipes) else " (or recipe=)"),
        )
    if len(_groups(table)) < LEAST_BUDGETS:
        raise Refusal(
            "few_budgets",
            f"{counted(len(table), 'run')} {budgets_in_words(table)}: a scaling law needs at least {LEAST_BUDGETS} "
            f"budgets",
        )


def budgets_in_words(table: Table) -> str:
    """Such as "at 5 budgets", or "in 7 octaves of FLOPs" if the runs share none."""
    index, common = budgets(table)
    count = len(set(index.tolist()))
    return f"at {counted(count, 'budget')}" if common else f"in {counted(count, 'octave')} of FLOPs"


def _groups(table: Table) -> list[NDArray[np.int64]]:
    """The rows of each budget, smallest first."""
    index = budgets(table).level
    return [np.flatnonzero(index == b) for b in range(int(index.max()) + 1 if len(table) else 0)]


def _shapes(table: Table) -> set[tuple[float, ...]]:
    names = [name for name in ("experts", "top_k", "granularity") if name in table.extra]
    return set(zip(*(table.extra[name].tolist() for name in names), strict=True)) if names else {()}


def _columns(form: Form, table: Table) -> Columns:
    known: Mapping[str, Array] = table.columns
    missing = [name for name in form.needs if name not in known or not np.isfinite(known[name]).all()]
    if missing:
        raise Refusal("columns", f"{form.name} needs the column {' and '.join(missing)}")
    # `unique` may be the same for all runs: the tokens read then show what repetition is worth.
    level = [name for name in form.needs if name != "unique" and len(np.unique(known[name])) < 2]
    if level:
        raise Refusal("columns", f"{form.name} needs more than one value of {' and '.join(level)}")
    if "unique" in form.needs and not (known["unique"] > 0).all():
        raise Refusal("columns", f"{form.name} needs unique above 0 in every row")
    if "unique" in form.needs and not repeats(table).any():
        raise Refusal("columns", f"{form.name} needs runs that repeat tokens (d above unique)")
    if "experts" not in form.needs and len(_shapes(table)) > 1 and "active_ratio" not in form.needs:
        raise Refusal(
            "columns", f"{form.name} does not model experts, but the table has {len(_shapes(table))} kinds of models"
        )
    return {name: known[name] for name in form.needs}

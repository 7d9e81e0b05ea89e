"""Predictions with intervals: the loss at a budget or of a model, and the compute-optimal choices."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .allocation import SHAPE, Kind, columns_at, kinds, repeats
from .fitting import check, named, solved
from .forms.dense import Approach3, Array, DataConstrained, Form, Gadre, Kaplan
from .intervals import Extrapolation, Interval, extrapolate
from .joint import Joint
from .refusal import Refusal, edge, refused
from .table import Table

LEVEL = 0.95
WIDEST = 10.0
"""Factor from the low to the high end of N's interval above which no best size is named."""


class Rival(NamedTuple):
    """Another kind of model that may be the best at a budget; see `Prediction`."""

    shape: Mapping[str, float]
    loss: Interval
    n: Interval
    d: Interval

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {key: getattr(self, key)._asdict() for key in ("loss", "n", "d")} | {"shape": dict(self.shape)}


@dataclass(frozen=True)
class Prediction:
    """What a fit predicts for a budget, or for a model."""

    budget: float
    """Training FLOPs."""
    loss: Interval
    """Of the law, nats per token."""
    run_loss: Interval
    """Of one run, which has noise of its own."""
    n: Interval
    """Parameters, in the table's convention; the best for the budget, or those given. The value is NaN if none can be
    named: if the interval spans more than a factor of ten."""
    d: Interval
    """Training tokens, likewise."""
    shape: Mapping[str, float]
    """experts, top_k, ... of the best kind of model, where the table has several."""
    form: str
    convention: str
    level: float
    method: Mapping[str, Any]
    """How the interval was computed."""
    unique: float | None = None
    """Unique tokens available; None: no limit."""
    warnings: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    """Other kinds of models whose loss interval overlaps that of the best one, by their loss: with `shape`, the kinds
    among which the best one is at this level."""

    @property
    def unnamed(self) -> str:
        """Why no best size is named; empty: one is."""
        if not np.isnan(self.n.value):
            return ""
        return (
            f"no best size is given for {self.budget:.3g} FLOPs: it may be anything from {self.n.low:.2g} to "
            f"{self.n.high:.2g}; runs of other sizes with equal FLOPs (a sweep's `isoflop`) would determine it"
        )

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        intervals = {key: getattr(self, key)._asdict() for key in ("loss", "run_loss", "n", "d")}
        return (
            asdict(self)
            | intervals
            | {"shape": dict(self.shape), "method": dict(self.method), "warnings": list(self.warnings)}
            | {"rivals": [each.summary() for each in self.rivals]}
        )


class Frontier(NamedTuple):
    """The lowest loss of one kind of models against FLOPs, as `Forecast.at_budget` gives it; shape (budgets,)."""

    c: Array
    loss: Array
    low: Array
    high: Array
    fitted: tuple[float, float]
    """The least and the most FLOPs of the runs that the law was fitted to."""
    form: str


class Forecast:
    """Predictions from a table of runs. A law is fitted to each kind of models once, when it is first asked for.

    Args:
        form: None: `Crossed` near the largest budgets, and Muennighoff et al.'s law where runs repeat tokens; or
            another, on all runs; a law of experts: on those of all kinds of models together (`joint`).
        unique: unique tokens available; a model trained on more repeats some; infinite: no limit.

    Raises:
        Refusal: by each method, if the runs do not determine the law, or not the value of repeated tokens.
    """

    def __init__(self, table: Table, form: Form | None = None, seed: int = 0, unique: float = np.inf) -> None:
        self.table, self.form, self.seed, self.unique = table, form, seed, unique
        self.kinds = kinds(table)
        self._laws: dict[tuple[float, ...], Extrapolation] = {}

    def at_budget(
        self, budget: float, unique: float | None = None, shape: Mapping[str, float] | None = None
    ) -> Prediction:
        """The compute-optimal model of a budget and its loss; of several kinds of models, the best.

        Args:
            unique: unique tokens available; None: as for the whole forecast.
            shape: of the one kind to predict, as `at_size`.
        """
        laws = [self._law(each, unique) for each in ([self._kind(shape)] if shape else self.kinds)]
        found = [law.at_budget(budget, LEVEL) for law in laws]
        for law, each in zip(laws, found, strict=True):
            _check_repeats(law, each["d"].value, f"the best model of {budget:.3g} FLOPs")
        best, *others = sorted(range(len(laws)), key=lambda each: found[each]["loss"].value)
        rivals = [
            Rival(laws[each].kind.shape, **_named(found[each])) for each in others
            if found[each]["loss"].low <= found[best]["loss"].high
        ]  # fmt: skip
        prediction = _prediction(self.table, laws[best], budget, **_named(found[best]))
        warnings = (*prediction.warnings, *([prediction.unnamed] if prediction.unnamed else []))
        return replace(prediction, rivals=tuple(rivals), warnings=warnings)

    def frontier(self, c: Array, index: int = 0) -> Frontier:
        """The lowest loss of one of `kinds` at each budget, with its interval."""
        law = self._law(self.kinds[index], None)
        found = [law.at_budget(float(budget), LEVEL) for budget in c]
        _check_repeats(law, max(each["d"].value for each in found), f"the best model of {c.max():.3g} FLOPs")
        value, low, high = np.array([each["loss"] for each in found]).T
        used = law.table.c[np.any([each.window.rows for each in law.laws], axis=0)]
        form = " and ".join(each.form.name for each in law.laws)
        return Frontier(c, value, low, high, (float(used.min()), float(used.max())), form)

    def at_size(
        self, n: float, d: float, shape: Mapping[str, float] | None = None, unique: float | None = None
    ) -> Prediction:
        """The loss of a model of n parameters after d tokens.

        Args:
            shape: of the kind of model, such as {"experts": 16}; the table need not have runs of it, if it has them of
                four kinds or more (`joint`); None: the table's first.
            unique: unique tokens available; None: as for the whole forecast.
        """
        law = self._law(self._kind(shape) if shape else self.kinds[0], unique)
        _check_repeats(law, d, "the model")
        budget = float(columns_at(law.kind, law.table, np.log([n]), np.log([d]))["c"][0])
        return _prediction(self.table, law, budget, law.at_size(n, d, LEVEL), Interval(n, n, n), Interval(d, d, d))

    @cached_property
    def joint(self) -> Joint:
        """The law of all kinds of models together. Raises Refusal."""
        return Joint(self.table, self.form if self._of_kinds else None, self.seed)

    @property
    def _of_kinds(self) -> bool:
        """Whether the form that was asked for is one of several kinds of models."""
        return self.form is not None and bool(set(self.form.needs) & set(SHAPE))

    def _kind(self, shape: Mapping[str, float]) -> Kind:
        """A kind of the table, or one of `Joint.unseen`. Raises Refusal."""
        known = next((kind for kind in self.kinds if kind.shape == dict(shape)), None)
        return known or self.joint.unseen(shape)

    def _law(self, kind: Kind, unique: float | None) -> Extrapolation:
        """The law of one kind's runs alone, free of what a law of experts assumes of other kinds; the joint one if it
        was asked for, or if the kind has no runs or too few."""
        key = tuple(kind.shape.values())
        if key not in self._laws:
            self._laws[key] = self.joint.law(kind) if self._of_kinds or not len(kind.rows) else self._own(kind)
        law = self._laws[key]
        return replace(law, kind=law.kind._replace(unique=self.unique if unique is None else unique))

    def _own(self, kind: Kind) -> Extrapolation:
        table = self.table.take(kind.rows)
        try:
            return _trusted(table, self.form, kind._replace(rows=np.arange(len(table))), self.seed)
        except Refusal as refusal:
            if refusal.kind == "repeats" or self.form is not None:
                raise
            try:
                return self.joint.law(kind)
            except Refusal:
                raise refusal from None


def predict(table: Table, budget: float, form: str | None = None, unique: float = np.inf) -> Prediction:
    """The loss and the best size at a budget of training FLOPs.

    Args:
        form: name of a law; None: as the runs allow.
        unique: unique tokens available; infinite: no limit.

    Raises:
        ConfigError: no such law, or a table that no law can be fitted to.
        Refusal: the runs do not determine the law.
    """
    check(table)
    return Forecast(table, named(form) if form else None, unique=unique).at_budget(budget)


def _trusted(table: Table, form: Form | None, kind: Kind, seed: int) -> Extrapolation:
    """The law of one kind's runs, from the forms that the runs determine. Raises Refusal if there are none."""
    again = repeats(table)
    if form is None and again.any():
        try:
            return _trusted(table, DataConstrained(), kind, seed)
        except Refusal as refusal:
            note = f"{again.sum()} of {len(again)} runs repeat tokens and are left out: {refusal}"
            once = table.take(~again)
            if not len(once):
                raise
            found = _trusted(once, None, kind._replace(rows=np.arange(len(once))), seed)
            return replace(found, notes=(note,))
    if form is not None:
        _, solution = solved(form, table)
        if why := edge(form, solution.at_bound):
            raise why
    try:
        found = extrapolate(table, form, kind, seed=seed)
    except Refusal as refusal:
        if form is None and refusal.kind == "few_rows" and (smaller := _smaller(table, kind, seed)):
            raise Refusal(refusal.kind, f"{refusal}; --form {smaller} could be fitted") from None
        raise
    whys = {law.form.name: edge(form or law.form, law.at_bound) for law in found.laws}
    if form is None:
        try:
            _, solution = solved(Approach3(), table)
            plain = edge(Approach3(), solution.at_bound)
        except Refusal as refusal:
            plain = refusal
        if plain is None and all(whys.values()):
            return _trusted(table, Approach3(), kind, seed)
        whys["approach3"] = plain or whys.get("approach3")
    sound = tuple(law for law in found.laws if whys[law.form.name] is None)
    if not sound:
        why = refused({name: why for name, why in whys.items() if why}, "no law is reliable")
        raise Refusal(
            why.kind,
            f"{why}\n`muster sweep fit` lists every form: one that it does not refuse can be named with --form",
        )
    return replace(found, laws=sound)


def _smaller(table: Table, kind: Kind, seed: int) -> str:
    """A law of fewer coefficients that the runs determine; empty: there is none."""
    for form in (Kaplan(), Gadre()):
        with contextlib.suppress(Refusal):
            _trusted(table, form, kind, seed)
            return form.name
    return ""


def _named(found: Mapping[str, Interval]) -> dict[str, Interval]:
    """Without a value of N and D where their interval is too wide to name one."""
    if found["n"].high <= WIDEST * found["n"].low:
        return dict(found)
    return dict(found) | {key: found[key]._replace(value=np.nan) for key in ("n", "d")}


def _check_repeats(law: Extrapolation, d: float, what: str) -> None:
    """Raise Refusal if the law would take repeated tokens for new ones."""
    if d > 1.01 * law.kind.unique and not all("unique" in each.form.needs for each in law.laws):
        why = law.notes[0] if law.notes else "no run of the table repeats any (no row with d above unique)"
        raise Refusal(
            "repeats",
            f"{what} reads {d:.3g} tokens but only {law.kind.unique:.3g} are unique: the value of repeated tokens "
            f"is unknown, as {why}",
        )


def _prediction(
    table: Table, law: Extrapolation, budget: float, loss: Interval, n: Interval, d: Interval
) -> Prediction:
    noise = 1.96 * max(each.window.noise for each in law.laws)
    down, up = np.hypot(np.log([loss.value / loss.low, loss.high / loss.value]), noise).tolist()
    return Prediction(
        budget=budget, loss=loss, n=n, d=d,
        run_loss=Interval(loss.value, loss.value * float(np.exp(-down)), loss.value * float(np.exp(up))),
        shape=law.kind.shape, form=" and ".join(each.form.name for each in law.laws), convention=table.convention,
        level=LEVEL, method=law.record(), unique=law.kind.unique if np.isfinite(law.kind.unique) else None,
        warnings=_warnings(law, budget, n.value),
    )  # fmt: skip


def _warnings(law: Extrapolation, budget: float, n: float) -> tuple[str, ...]:
    found = list(law.notes)
    if not np.isfinite(law.kind.unique) and any("unique" in each.form.needs for each in law.laws):
        found.append("all tokens are assumed to be unique: set --unique if they are not")
    if (times := budget / law.last) > 100:
        found.append(f"{budget:.3g} FLOPs are {times:,.0f} times the largest fitted budget")
    sizes = law.table.n
    if n < sizes.min() / 30 or n > sizes.max() * 30:
        found.append(f"N = {n:.3g} is far from the fitted sizes ({sizes.min():.3g} to {sizes.max():.3g})")
    if max(len(each.loss_drift.held) for each in law.laws) < 2:
        found.append("too few budgets to hold any back: the interval assumes that the law is right")
    return tuple(found)

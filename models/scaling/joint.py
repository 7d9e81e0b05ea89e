"""One law of all kinds of models together, for the kinds that have few runs of their own, or none.

A law of experts (`forms.sparse`) is fitted to the runs of all kinds. Each kind is then left out in turn, predicted from
the others, and its mean error noted: how much a kind departs from the law. That departure is part of every interval. A
kind with runs is moved towards its own mean residual, the further the more runs it has (partial pooling: its departure
is normal with the deviation that the kinds left out have shown); one without runs is predicted by the law itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs import counted

from .allocation import SHAPE, Kind, kinds, log_losses, optimum
from .drift import columns
from .fitting import solved
from .forms.dense import Array, Form
from .forms.solve import solve_parts
from .forms.sparse import MOE_FORMS
from .intervals import Extrapolation, Interval, extrapolate
from .refusal import Refusal, refused
from .table import Table

LEAST_KINDS = 4
"""Fewest kinds of a joint law: with one of them left out, three still show a bend."""
NEARLY = 1.05
"""Of the forms whose error on kinds left out is within this factor of the lowest, the one of fewest coefficients."""


@dataclass(frozen=True)
class Pooled(Extrapolation):
    """The joint law's predictions of one kind."""

    shift: float = 0.0
    """In ln L: how far this kind departs from the law."""
    doubt: float = 0.0
    """Standard deviation of that departure."""
    freedom: int = 1
    """Degrees of freedom with which the departures of kinds are known."""
    others: Array = field(default_factory=lambda: np.empty((0, 0)))
    """Parameters of the fits with a kind left out, shape (K, P)."""

    def at_budget(self, budget: float, level: float = 0.95) -> dict[str, Interval]:
        found = super().at_budget(budget, level)
        # How far N* depends on which kinds there are: the jackknife over kinds (Efron and Stein, 1981).
        without = np.log(optimum(self.laws[0].form, self.others, self.table, budget, self.kind).n)
        spread = float(np.sqrt((len(without) - 1) * without.var()))
        n = self._moved(found["n"], 0.0, spread, level)
        d = np.exp(self.kind.log_tokens(np.log(np.array(n)), budget))
        loss = self._moved(found["loss"], self.shift, self.doubt, level)
        return {"loss": loss, "n": n, "d": Interval(float(d[0]), float(d[2]), float(d[1]))}

    def at_size(self, n: float, d: float, level: float = 0.95) -> Interval:
        return self._moved(super().at_size(n, d, level), self.shift, self.doubt, level)

    def _aside(self, n: float, budget: float) -> float:
        """Distance beyond the table's sizes: this law is fitted to all runs, not to those near a frontier."""
        return float(max(0.0, np.log(n / self.table.n.max()), np.log(self.table.n.min() / n)))

    def record(self) -> dict[str, Any]:
        return super().record() | {"joint": {"shift": self.shift, "deviation_of_kinds": self.doubt}}

    def _moved(self, found: Interval, shift: float, deviation: float, level: float) -> Interval:
        """An interval moved in its logarithm, and widened by a deviation that is known from few kinds."""
        widths = np.log([found.value / found.low, found.high / found.value])
        student = np.random.default_rng(self.seed).standard_t(self.freedom, 20_000)
        down, up = np.hypot(widths, deviation * float(np.percentile(student, 50 * (1 + level)))).tolist()
        value = found.value * float(np.exp(shift))
        return Interval(value, value * float(np.exp(-down)), value * float(np.exp(up)))


class Joint:
    """A law of all kinds of a table.

    Args:
        form: one of `MOE_FORMS`; None: that with the lowest error on kinds left out.

    Attributes:
        departures: mean ln L minus the law's of each kind, predicted from the other kinds, shape (K,).

    Raises:
        Refusal: too few kinds or runs, or no form can be fitted.
    """

    def __init__(self, table: Table, form: Form | None = None, seed: int = 0) -> None:
        self.table, self.kinds, self.seed = table, kinds(table), seed
        if len(self.kinds) < LEAST_KINDS:
            raise Refusal(
                "few_kinds",
                f"a law of several kinds of models needs runs of at least {LEAST_KINDS}, such as four numbers of "
                f"experts, but the table has {len(self.kinds)}",
            )
        whys: dict[str, Refusal] = {}
        found: list[tuple[float, Form, Array, Array]] = []
        for each in [form] if form else MOE_FORMS:
            try:
                found.append(self._left_out(each))
            except Refusal as refusal:
                whys[each.name] = refusal
        if not found:
            raise refused(whys, "no law of several kinds of models can be fitted")
        best = min(error for error, *_ in found)
        _, self.form, self._others, self.departures = min(
            (each for each in found if each[0] <= NEARLY * best), key=lambda each: each[1].size
        )
        self._law = extrapolate(table, self.form, self.kinds[0], seed=seed)

    def _left_out(self, form: Form) -> tuple[float, Form, Array, Array]:
        """(error, form, the fits without each kind, the kinds' departures); the error is the root mean square of the
        residuals of kinds left out, all kinds alike. Raises Refusal."""
        x, solution = solved(form, self.table)
        parts = np.ones((len(self.kinds), len(self.table)), dtype=bool)
        for part, kind in zip(parts, self.kinds, strict=True):
            part[kind.rows] = False
        if parts.sum(axis=1).min() < form.size + 1:
            raise Refusal("few_rows", f"{form.name} needs more than {form.size} runs with any kind left out")
        others, _ = solve_parts(form, x, self.table.loss, parts, solution.parameters)
        residuals = np.log(self.table.loss) - form.log_loss(others, x)
        own = [residuals[i, kind.rows] for i, kind in enumerate(self.kinds)]
        error = float(np.sqrt(np.mean([(each**2).mean() for each in own])))
        if not np.isfinite(error):
            raise Refusal("convergence", f"{form.name}: a fit with one kind left out did not converge")
        return error, form, others, np.array([each.mean() for each in own])

    def law(self, kind: Kind) -> Pooled:
        """Predictions of a kind, of the table or of `unseen`."""
        inner, doubt, freedom = self._doubt(kind)
        shift = 0.0
        if len(kind.rows):
            law = self._law.laws[0]
            fitted = log_losses(law.form, law.parameters[0], columns(law.form, self.table, kind.rows))[0]
            residuals = np.log(self.table.loss[kind.rows]) - fitted
            noise = max(law.window.noise, 1e-6) / np.sqrt(len(residuals))
            pooled = inner**2 / (inner**2 + noise**2)
            shift, doubt = float(pooled * residuals.mean()), float(np.sqrt(pooled) * noise)
        fields = {name: getattr(self._law, name) for name in ("table", "laws", "last", "seed")}
        note = f"by one law of {counted(len(self.kinds), 'kind')} of models"
        note += f", none of them this one ({_words(kind.shape)})" if not len(kind.rows) else ""
        return Pooled(
            **fields, kind=kind, notes=(note,), shift=shift, doubt=doubt, freedom=freedom, others=self._others
        )

    def unseen(self, shape: Mapping[str, float]) -> Kind:
        """A kind that the table has no runs of.

        Args:
            shape: some of the table's columns that tell kinds apart; `active_ratio` follows from experts and top_k, and
                a column in which all models with experts agree may be left out.

        Raises:
            Refusal: a column is missing or unknown.
        """
        known = self.kinds[0].shape
        if unknown := [name for name in shape if name not in known]:
            raise Refusal("kind", f"--kind {unknown[0]}: the table tells kinds apart by {', '.join(known)}")
        found = dict(shape)
        for name in known:
            if name in found:
                continue
            values = {kind.shape[name] for kind in self.kinds if kind.shape.get("experts", 2) > 1}
            if name == "active_ratio" and {"experts", "top_k"} <= found.keys():
                found[name] = found["top_k"] / found["experts"]
            elif len(values) == 1:
                (found[name],) = values
            else:
                raise Refusal(
                    "kind", f"--kind {_words(shape)} leaves {name} open: give it too, such as {name}={max(values):g}"
                )
        found = {name: float(found[name]) for name in known}
        if same := next((kind for kind in self.kinds if kind.shape == found), None):
            return same
        return Kind(found, self._cost(found), np.empty(0, dtype=np.int64))

    def _cost(self, shape: Mapping[str, float]) -> Array:
        """FLOPs per token as `Kind` has them: ln(C / (N D)), linear in ln N and the logarithm of each shape column."""
        table, names = (
            self.table,
            [name for name in SHAPE if name in shape and len(np.unique(self.table.extra[name])) > 1],
        )
        ratio = np.log(table.c / (table.n * table.d))
        if np.ptp(ratio) < 1e-3:
            return np.array([ratio.mean()])
        design = np.stack(
            [np.log(table.n), np.ones(len(table)), *(np.log(table.extra[name]) for name in names)], axis=1
        )
        slope, base, *by_shape = np.linalg.lstsq(design, ratio, rcond=None)[0]
        return np.array([slope, base + sum(b * np.log(shape[name]) for b, name in zip(by_shape, names, strict=True))])

    def _doubt(self, kind: Kind) -> tuple[float, float, int]:
        """Deviation of the departures of all kinds; of this one, as of the kinds that lie within, or outside, the range
        of the others as it does; and its degrees of freedom."""
        places = np.array([_place(each.shape) for each in self.kinds])
        every = np.arange(len(places))
        spots = [(_outside(places[i], places[every != i]), _nearest(places[i], places[every != i])) for i in every]
        outside, distance = _outside(_place(kind.shape), places), _nearest(_place(kind.shape), places)
        alike = [i for i, (out, _) in enumerate(spots) if out == outside] or every.tolist()
        typical = float(np.median([spots[i][1] for i in alike]))
        everywhere = float(np.sqrt((self.departures**2).mean()))
        own = float(np.sqrt((self.departures[alike] ** 2).mean()))
        # Few kinds lie at an end: they alone do not show a smaller error than all.
        own = max(own, everywhere) if outside else own
        return everywhere, own * max(1.0, distance / typical if typical else 1.0), len(alike)


def _words(shape: Mapping[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in shape.items())


def _place(shape: Mapping[str, float]) -> Array:
    return np.log(np.array(list(shape.values())))


def _outside(place: Array, others: Array) -> bool:
    return bool(((place < others.min(axis=0) - 1e-9) | (place > others.max(axis=0) + 1e-9)).any())


def _nearest(place: Array, others: Array) -> float:
    distance = np.sqrt(((others - place) ** 2).sum(axis=1))
    return float(distance.min())

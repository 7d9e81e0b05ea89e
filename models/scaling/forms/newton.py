"""Newton's method for a batch of fits of one form, on Huber's or the squared residual."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dense import Array, Columns, Form, Monomials

EXACT = 1e-9
"""A residual that counts as zero: a table without noise has an optimum too."""
FLOOR = float(np.log(1e-6))
"""Least mean of ln(theta phi / sum): below it, a term has vanished from the form."""
AT_ONCE, LEAST_AT_ONCE = 30_000, 8
"""Fits times rows that are computed at once, so that their arrays stay in the cache, and the fewest fits."""
MOST_RIDGE = 1e12
"""Damping at which a descent has stalled."""


@dataclass(frozen=True)
class Objective:
    """sum_i w_i huber(r_i), r = ln L - ln loss or L - loss."""

    scale: Literal["log", "linear"] = "log"
    delta: float = 1e-3
    """Huber's; infinite: least squares."""

    def __str__(self) -> str:
        space = {"log": "log loss", "linear": "loss"}[self.scale]
        return f"least squares on {space}" if np.isinf(self.delta) else f"Huber({self.delta:g}) on {space}"


HUBER_LOG = Objective()
"""Hoffmann et al.: Huber with delta 1e-3 on log loss."""
LEAST_SQUARES = Objective(scale="linear", delta=np.inf)


class Prior(NamedTuple):
    """A normal prior of gamma, in units of the objective: it adds precision (gamma - mean)^2 / 2."""

    mean: Array
    """Shape (B, G)."""
    precision: Array
    """Shape (B, G); 0: none."""


@dataclass
class _Batch:
    """Fits that are computed at once, B of them."""

    fits: NDArray[np.int64]
    """Which of all fits."""
    log_loss: Array
    weights: Array
    """Of mean 1 over the rows."""
    prior: Prior | None
    p: Array
    state: tuple[Array, ...]
    """At p, by `Descent._state`."""
    mix: Array
    """Share of the majoriser in the Hessian."""
    ridge: Array
    """Damping, relative to the Hessian's diagonal."""
    steps: NDArray[np.int64]
    over: NDArray[np.bool_]
    """Fits that have ended, and have not been taken out yet."""

    def take(self, which: NDArray[np.bool_]) -> "_Batch":
        return self._map(lambda arrays: arrays[0][which])

    def joined(self, other: "_Batch") -> "_Batch":
        return self._map(np.concatenate, other)

    def _map(self, function: Callable[[Sequence[Array]], Array], *others: "_Batch") -> "_Batch":
        """Apply a function to each array of all batches, such as (own, other)."""

        def each(values: Sequence[Any]) -> Any:
            if values[0] is None:
                return None
            if isinstance(values[0], tuple):
                parts = [each(part) for part in zip(*values, strict=True)]
                return Prior(*parts) if isinstance(values[0], Prior) else tuple(parts)
            return function(values)

        batches = (self, *others)
        return _Batch(**{one.name: each([getattr(batch, one.name) for batch in batches]) for one in fields(self)})


class Descent:
    """Fits of one form to the same rows, each with its own weights (and losses).

    f = ln L has the gradient u = power * sum_j s_j z_j, s_j being the share of term j, z_j = d ln(theta_j phi_j) / dp,
    and the curvature power * sum_j s_j z_j z_j^T - u u^T / power where z does not depend on p (products of powers; for
    other forms what is left out only slows the descent).

    Args:
        log_loss: shape (B, rows).
        weights: shape (B, rows).
        prior: of gamma; None: flat within its bounds.
    """

    def __init__(
        self, form: Form, x: Columns, log_loss: Array, weights: Array, objective: Objective, prior: Prior | None = None
    ) -> None:
        self.form, self.x, self.objective, self.prior = form, x, objective, prior
        self.log_loss, self.weights = log_loss, weights
        self.terms, self.gammas = len(form.linear), len(form.nonlinear)
        self.low, self.high = np.array(form.bounds, dtype=float).reshape(-1, 2).T
        self.fixed = form.gradients(self.low[None], x) if isinstance(form, Monomials) else None
        if self.fixed is not None:  # what does not change is computed once
            self.uses = self.fixed[0].any(axis=2)
            self.curves = [self._products(self.fixed[0, j], self.uses[j]) for j in range(self.terms)]

    def _products(self, z: Array, used: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """Where in the Hessian a term has curvature, and z_p z_q there (rows, entries); z has shape (G, rows)."""
        which = np.flatnonzero(used)
        g, h = which[np.tril_indices(len(which))[0]], which[np.tril_indices(len(which))[1]]
        first, second = np.concatenate([np.full(len(which), -1), g]), np.concatenate([which, h])
        return first, second, np.ascontiguousarray(np.concatenate([z[which], z[g] * z[h]]).T)

    def run(self, p: Array, iterations: int) -> tuple[Array, Array, Array]:
        """Descend from p (B, P). Returns the ends, the objective there, and the gradient's largest scaled entry.

        Some of the fits are computed at once; those that have ended make room for the next, so that a few slow ones
        do not hold up the rest.
        """
        count, most = len(p), max(LEAST_AT_ONCE, AT_ONCE // self.log_loss.shape[1])
        end, values, steepness = np.empty(p.shape), np.zeros(count), np.zeros(count)
        begun = min(most, count)
        now = self._begin(p, np.arange(begun))
        while len(now.fits):
            gradient, hessian, scaled = self._derivatives(now)
            over = (scaled <= 1e-8) | (now.ridge >= MOST_RIDGE) | (now.steps == iterations)
            ended = over & ~now.over
            if ended.any():
                which = now.fits[ended]
                end[which], values[which], steepness[which] = now.p[ended], now.state[0][ended], scaled[ended]
                now.over |= over
                # To take fits out copies all the others: worth it for several.
                if 8 * now.over.sum() >= len(now.over):
                    going = ~now.over
                    now, gradient, hessian = now.take(going), gradient[going], hessian[going]
            if len(now.fits):
                self._step(now, gradient, hessian)
            if begun < count and 2 * len(now.fits) <= most:
                more = min(most - len(now.fits), count - begun)
                now = now.joined(self._begin(p, np.arange(begun, begun + more)))
                begun += more
        return end, values, steepness

    def _begin(self, p: Array, fits: NDArray[np.int64]) -> "_Batch":
        weights = self.weights[fits]
        weights = weights / weights.mean(axis=1, keepdims=True)
        prior = Prior(self.prior.mean[fits], self.prior.precision[fits]) if self.prior else None
        start = self._within(p[fits], np.full((len(fits), self.terms), -np.inf))
        now = _Batch(
            fits, self.log_loss[fits], weights, prior, start, (), mix=np.ones(len(fits)),
            ridge=np.full(len(fits), 1e-3), steps=np.zeros(len(fits), dtype=int), over=np.zeros(len(fits), dtype=bool),
        )  # fmt: skip
        now.state = self._state(start, now)
        return now

    def _step(self, now: "_Batch", gradient: Array, hessian: Array) -> None:
        """Try a step of every fit, and keep those that descend."""
        p, state = now.p, now.state
        diagonal = np.einsum("bpp->bp", hessian)
        diagonal += now.ridge[:, None] * np.abs(diagonal) + 1e-14
        step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A term that its exponents took below the floor stays: lifting it would make every step be rejected.
        least = p[:, : self.terms] + np.minimum(FLOOR - state[-1], 0.0)
        trial = self._within(p + np.clip(step, -2.0, 2.0), least)
        tried = self._state(trial, now)
        better = tried[0] < state[0]
        worse = np.flatnonzero(~better)
        for before, after in zip((p, *state), (trial, *tried), strict=True):
            after[worse] = before[worse]
        now.p, now.state = trial, tried
        now.mix = np.where(better, now.mix / 4, np.minimum(1.0, 4 * now.mix + 0.02))
        now.ridge = np.where(better, np.maximum(now.ridge / 5, 1e-12), np.minimum(now.ridge * 6, MOST_RIDGE))
        now.steps += 1

    def _within(self, p: Array, least: Array) -> Array:
        """p with gamma in its bounds and ln theta at `least` (B, J) or more."""
        theta, gamma = np.maximum(p[:, : self.terms], least), np.clip(p[:, self.terms :], self.low, self.high)
        return np.concatenate([theta, gamma], axis=1)

    def _state(self, p: Array, now: "_Batch") -> tuple[Array, ...]:
        """The objective (B,), the residuals and ln L (B, rows), the terms' shares (B, J, rows) and the weighted means
        of these shares' logarithms (B, J)."""
        theta, gamma = p[:, : self.terms], p[:, self.terms :]
        shares = theta[:, :, None] + self.form.log_terms(gamma, self.x)
        means = np.matmul(shares, now.weights[..., None])[..., 0]
        top = shares.max(axis=1)
        shares -= top[:, None]
        np.exp(shares, out=shares)
        total = shares.sum(axis=1)
        shares /= total[:, None]
        log_sum = top + np.log(total)
        f = self.form.power(gamma)[:, None] * log_sum
        residual = f - now.log_loss if self.objective.scale == "log" else np.exp(f) - np.exp(now.log_loss)
        size, delta = np.abs(residual), self.objective.delta
        if np.isinf(delta):
            costs = 0.5 * residual**2
        else:
            near = np.minimum(size, delta)
            costs = near * (size - 0.5 * near)
        value = np.einsum("bn,bn->b", costs, now.weights)
        if now.prior:
            value += 0.5 * (now.prior.precision * (gamma - now.prior.mean) ** 2).sum(axis=1)
        mean_log_sum = np.einsum("bn,bn->b", log_sum, now.weights)
        return (
            np.where(np.isfinite(value), value, np.inf),
            residual,
            f,
            log_sum,
            shares,
            (means - mean_log_sum[:, None]) / log_sum.shape[1],
        )

    def _derivatives(self, now: "_Batch") -> tuple[Array, Array, Array]:
        """Gradient (B, P), a mixture of Hessian and majoriser (B, P, P), and the largest scaled gradient (B,)."""
        p, mix, weights, delta = now.p, now.mix, now.weights, self.objective.delta
        _, residual, f, log_sum, shares, means = now.state
        gamma = p[:, self.terms :]
        z = self.form.gradients(gamma, self.x) if self.fixed is None else self.fixed
        power = self.form.power(gamma)
        batch, _, rows = shares.shape
        u = np.empty((batch, p.shape[1], rows))
        u[:, : self.terms] = shares
        if self.fixed is not None:
            for g in range(self.gammas):
                used = np.flatnonzero(self.uses[:, g])
                u[:, self.terms + g] = sum(shares[:, j] * self.fixed[0, j, g] for j in used)
        else:
            u[:, self.terms :] = np.einsum("bjn,bjgn->bgn", shares, z)
        one = bool((power == 1).all())
        if not one:
            u *= power[:, None, None]
            u[:, self.terms :] += self.form.power_gradient(gamma)[:, :, None] * log_sum[:, None]
        slope = 1.0 if self.objective.scale == "log" else np.exp(f)  # dr / df
        size = np.abs(residual)
        psi = weights * (residual if np.isinf(delta) else np.clip(residual, -delta, delta))
        pull = psi * slope
        gradient = np.matmul(u, pull[..., None])[..., 0]
        majoriser = weights * (1.0 if np.isinf(delta) else delta / np.maximum(size, delta)) * slope**2
        inside = weights * (size <= delta) * slope**2
        newton = inside - pull / power[:, None] + (0 if self.objective.scale == "log" else psi * slope)
        outer = mix[:, None] * majoriser + (1 - mix[:, None]) * newton
        hessian = np.matmul(u * outer[:, None], u.transpose(0, 2, 1))
        self._add_curvature(hessian, (1 - mix)[:, None, None] * power[:, None, None] * pull[:, None] * shares, z)
        # What a parameter alone could gain, relative to the size of its residuals.
        spread = np.sqrt(np.einsum("bpn,bn->bp", u**2, majoriser))
        if now.prior:
            precision = now.prior.precision
            gradient[:, self.terms :] += precision * (gamma - now.prior.mean)
            np.einsum("bpp->bp", hessian)[:, self.terms :] += precision
            spread[:, self.terms :] = np.hypot(spread[:, self.terms :], np.sqrt(precision))
        noise = np.sqrt(np.einsum("bn,bn->b", majoriser, residual**2 + EXACT**2))[:, None]
        inner = (p[:, self.terms :] > self.low + 1e-12), (p[:, self.terms :] < self.high - 1e-12)
        down = np.concatenate([means > FLOOR + 1e-3, inner[0]], axis=1)
        up = np.concatenate([np.ones_like(means, dtype=bool), inner[1]], axis=1)
        held = (~down & (gradient > 0)) | (~up & (gradient < 0))
        gradient = np.where(held, 0.0, gradient)
        hessian[held] = 0.0
        hessian.transpose(0, 2, 1)[held] = 0.0
        np.einsum("bpp->bp", hessian)[held] = 1.0
        scaled = (np.abs(gradient) / (spread * noise + 1e-12)).max(axis=1)
        return gradient, hessian, scaled

    def _add_curvature(self, hessian: Array, pull: Array, z: Array) -> None:
        """Add sum_rows pull_j z_j z_j^T over the terms j; pull has shape (B, J, rows)."""
        terms = self.terms
        index = np.arange(terms)
        hessian[:, index, index] += pull.sum(-1)
        for j in range(terms):
            if self.fixed is not None:
                first, second, products = self.curves[j]
                for p, q, value in zip(first, second, (pull[:, j] @ products).T, strict=True):
                    one, other = (j if p < 0 else terms + p), terms + q
                    hessian[:, one, other] += value
                    if one != other:
                        hessian[:, other, one] += value
                continue
            if not z[:, j].any():
                continue
            weighted = pull[:, j, None] * z[:, j]
            cross = weighted.sum(-1)
            hessian[:, j, terms:] += cross
            hessian[:, terms:, j] += cross
            hessian[:, terms:, terms:] += np.matmul(weighted, z[:, j].transpose(0, 2, 1))

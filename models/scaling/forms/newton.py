"""Newton's method for a batch of fits of one form, on Huber's or the squared residual."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dense import Array, Columns, Form, Monomials

EXACT = 1e-9
"""A residual that counts as zero: a table without noise has an optimum too."""
FLOOR = float(np.log(1e-6))
"""Least mean of ln(theta phi / sum): below it, a term has vanished from the form."""


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
        self.log_loss, self.weights = log_loss, weights / weights.mean(axis=1, keepdims=True)
        self.terms, self.gammas = len(form.linear), len(form.nonlinear)
        self.low, self.high = np.array(form.bounds, dtype=float).reshape(-1, 2).T
        self.fixed = form.gradients(self.low[None], x) if isinstance(form, Monomials) else None

    def run(self, p: Array, iterations: int) -> tuple[Array, Array, Array]:
        """Descend from p (B, P). Returns the ends, the objective there, and the gradient's largest scaled entry."""
        p = self._within(p, np.full((len(p), self.terms), -np.inf))
        end, values, steepness = p.copy(), np.zeros(len(p)), np.zeros(len(p))
        active = np.arange(len(p))
        state = self._state(p, active)
        # mix: share of the majoriser in the Hessian; ridge: damping, relative to its diagonal.
        mix, ridge = np.ones(len(p)), np.full(len(p), 1e-3)
        for _ in range(iterations):
            gradient, hessian, scaled = self._derivatives(p, state, active, mix)
            values[active], end[active], steepness[active] = state[0], p, scaled
            going = (scaled > 1e-8) & (ridge < 1e12)
            if not going.any():
                break
            if not going.all():
                active, p, mix, ridge = active[going], p[going], mix[going], ridge[going]
                state = tuple(each[going] for each in state)
                gradient, hessian = gradient[going], hessian[going]
            diagonal = np.einsum("bpp->bp", hessian)
            diagonal += ridge[:, None] * np.abs(diagonal) + 1e-14
            step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
            # A term that its exponents took below the floor stays: lifting it would make every step be rejected.
            least = p[:, : self.terms] + np.minimum(FLOOR - state[-1], 0.0)
            trial = self._within(p + np.clip(step, -2.0, 2.0), least)
            tried = self._state(trial, active)
            better = tried[0] < state[0]
            p = np.where(better[:, None], trial, p)
            state = tuple(
                np.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(state, tried, strict=True)
            )
            mix = np.where(better, mix / 4, np.minimum(1.0, 4 * mix + 0.02))
            ridge = np.where(better, np.maximum(ridge / 5, 1e-12), ridge * 6)
        else:
            _, _, scaled = self._derivatives(p, state, active, mix)
            values[active], end[active], steepness[active] = state[0], p, scaled
        return end, values, steepness

    def _within(self, p: Array, least: Array) -> Array:
        """p with gamma in its bounds and ln theta at `least` (B, J) or more."""
        theta, gamma = np.maximum(p[:, : self.terms], least), np.clip(p[:, self.terms :], self.low, self.high)
        return np.concatenate([theta, gamma], axis=1)

    def _state(self, p: Array, active: NDArray[np.int64]) -> tuple[Array, ...]:
        """The objective (B,), the residuals and ln L (B, rows), the terms' shares (B, J, rows) and the means of
        these shares' logarithms (B, J)."""
        theta, gamma = p[:, : self.terms], p[:, self.terms :]
        shares = theta[:, :, None] + self.form.log_terms(gamma, self.x)
        means = shares.mean(axis=2)
        top = shares.max(axis=1)
        shares -= top[:, None]
        np.exp(shares, out=shares)
        total = shares.sum(axis=1)
        shares /= total[:, None]
        log_sum = top + np.log(total)
        f = self.form.power(gamma)[:, None] * log_sum
        target = self.log_loss[active]
        residual = f - target if self.objective.scale == "log" else np.exp(f) - np.exp(target)
        size, delta = np.abs(residual), self.objective.delta
        if np.isinf(delta):
            costs = 0.5 * residual**2
        else:
            near = np.minimum(size, delta)
            costs = near * (size - 0.5 * near)
        value = np.einsum("bn,bn->b", costs, self.weights[active])
        if self.prior:
            value += 0.5 * (self.prior.precision[active] * (gamma - self.prior.mean[active]) ** 2).sum(axis=1)
        return (
            np.where(np.isfinite(value), value, np.inf),
            residual,
            f,
            log_sum,
            shares,
            means - log_sum.mean(axis=1)[:, None],
        )

    def _derivatives(
        self, p: Array, state: tuple[Array, ...], active: NDArray[np.int64], mix: Array
    ) -> tuple[Array, Array, Array]:
        """Gradient (B, P), a mixture of Hessian and majoriser (B, P, P), and the largest scaled gradient (B,)."""
        _, residual, f, log_sum, shares, means = state
        weights, delta = self.weights[active], self.objective.delta
        gamma = p[:, self.terms :]
        z = self.form.gradients(gamma, self.x) if self.fixed is None else self.fixed
        power = self.form.power(gamma)
        batch, _, rows = shares.shape
        u = np.empty((batch, p.shape[1], rows))
        u[:, : self.terms] = shares
        if self.fixed is not None:
            for g in range(self.gammas):
                used = [j for j in range(self.terms) if self.fixed[0, j, g].any()]
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
        if self.prior:
            precision = self.prior.precision[active]
            gradient[:, self.terms :] += precision * (gamma - self.prior.mean[active])
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
            for g in range(self.gammas):
                if self.fixed is not None and not self.fixed[0, j, g].any():
                    continue
                first = pull[:, j] * z[:, j, g]
                cross = first.sum(-1)
                hessian[:, j, terms + g] += cross
                hessian[:, terms + g, j] += cross
                for h in range(g, self.gammas):
                    if self.fixed is not None and not self.fixed[0, j, h].any():
                        continue
                    both = np.einsum("bn,bn->b", first, np.broadcast_to(z[:, j, h], first.shape))
                    hessian[:, terms + g, terms + h] += both
                    if h > g:
                        hessian[:, terms + h, terms + g] += both

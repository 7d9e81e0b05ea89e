"""Functional forms of scaling laws of sparse models: the loss as a function of size, tokens and experts.

Signs and bases are the papers' own, so that coefficients compare directly with the published ones. `counts` is the N
that a law was written for; it can be fitted with any convention.

If a law has an exponent that itself depends on ln N, its two coefficients are nearly collinear: all N are far from 1.
So gamma holds that exponent at a typical size, which keeps the search's grid small and its steps straight;
`coefficients` gives it as the paper does.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from .dense import D_REF, Array, Columns, Form, Monomials

N_REF = 1e8
"""Size at which gamma holds the exponents that depend on N."""


def saturated(experts: Array, start: Array | float, most: Array | float) -> Array:
    """Ehat, the effective number of experts: E_start for one expert, never more than E_max (Clark et al.).

    1 / Ehat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max; all arguments broadcast.
    """
    inner = experts - 1 + 1 / (1 / start - 1 / most)
    return 1 / (1 / inner + 1 / most)


class Clark(Form):
    """L = E + 10^d N^a Ehat^(b + c log10 N): the law of routed models, with an irreducible floor.

    With E = 0 it is the published law, log10 L = a log10 N + b log10 Ehat + c log10 N log10 Ehat + d. N is the
    model's size without the additional experts, and all runs see the same number of tokens. A dense model has one
    expert.
    """

    name = "clark"
    source = "Clark et al., arXiv:2202.01169, eq. 1 saturating in E, with a floor"
    counts = "active"
    needs = ("n", "experts")
    linear: tuple[str, ...] = ("E", "A")
    nonlinear: tuple[str, ...] = ("a", "b", "c", "E_start", "E_max")
    bounds: tuple[tuple[float, float], ...] = (
        (-0.8, -0.01), (-0.6, 0.1), (-0.05, 0.15), (0.0, np.log(30.0)), (np.log(40.0), np.log(1e4)),
    )  # fmt: skip
    """Of a, the exponent of Ehat at N_REF, c, ln E_start, ln E_max."""
    interaction: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def log_terms(self, gamma: Array, x: Columns) -> Array:
        ln_n, log_n, ln_e = self._columns(gamma, x)
        exponent = gamma[:, 1:2] + (gamma[:, 2:3] * log_n if self.interaction else 0.0)
        terms = np.zeros((len(gamma), len(self.linear), len(ln_n)))
        terms[:, -1] = gamma[:, :1] * ln_n + exponent * ln_e
        return terms

    def gradients(self, gamma: Array, x: Columns) -> Array:
        ln_n, log_n, ln_e = self._columns(gamma, x)
        exponent = gamma[:, 1:2] + (gamma[:, 2:3] * log_n if self.interaction else 0.0)
        z = np.zeros((len(gamma), len(self.linear), len(self.nonlinear), len(ln_n)))
        z[:, -1, 0], z[:, -1, 1] = ln_n, ln_e
        if self.interaction:
            z[:, -1, 2] = log_n * ln_e
        if self.saturates:
            start, most = np.exp(gamma[:, -2:-1]), np.exp(gamma[:, -1:])
            offset = start * most / (most - start)
            inner = x["experts"] - 1 + offset
            by_inner = most / (inner * (inner + most))
            by_start = by_inner * (most / (most - start)) ** 2
            by_most = inner / (most * (inner + most)) - by_inner * (start / (most - start)) ** 2
            z[:, -1, -2], z[:, -1, -1] = exponent * by_start * start, exponent * by_most * most
        return z

    def _columns(self, gamma: Array, x: Columns) -> tuple[Array, Array, Array]:
        """ln N (rows,), log10 N / N_REF (rows,) and ln Ehat (B, rows)."""
        ln_n = np.log(x["n"])
        if self.saturates:
            ln_e = np.log(saturated(x["experts"], np.exp(gamma[:, -2:-1]), np.exp(gamma[:, -1:])))
        else:
            ln_e = np.broadcast_to(np.log(x["experts"]), (len(gamma), len(ln_n)))
        return ln_n, np.log10(x["n"] / N_REF), ln_e

    def coefficients(self, parameters: Array) -> dict[str, float]:
        found = super().coefficients(parameters)
        found["d"] = float(np.log10(found.pop("A")))
        found["b"] -= found.get("c", 0.0) * np.log10(N_REF)
        if self.saturates:
            found["E_start"], found["E_max"] = float(np.exp(found["E_start"])), float(np.exp(found["E_max"]))
        return found

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        given = dict(coefficients)
        given["A"] = 10 ** given["d"]
        given["b"] += given.get("c", 0.0) * np.log10(N_REF)
        for name in ("E_start", "E_max") if self.saturates else ():
            given[name] = np.log(given[name])
        return super().parameters(given)


class ClarkFloorless(Clark):
    """L = 10^d N^a Ehat^(b + c log10 N), as published."""

    name = "clark_floorless"
    source = "Clark et al., arXiv:2202.01169, eq. 1 saturating in E"
    linear = ("A",)


class ClarkSeparable(Clark):
    """L = E + 10^d N^a Ehat^b: experts help a model of any size by the same factor, above the floor."""

    name = "clark_separable"
    source = "Clark et al., arXiv:2202.01169, eq. 1 saturating in E, with a floor and c = 0"
    nonlinear = ("a", "b", "E_start", "E_max")
    bounds = (Clark.bounds[0], Clark.bounds[1], *Clark.bounds[3:])
    interaction = False


class ClarkUnsaturated(Clark):
    """L = E + 10^d N^a E^(b + c log10 N): more experts always help, but less the larger the model."""

    name = "clark_unsaturated"
    source = "Clark et al., arXiv:2202.01169, eq. 1, with a floor"
    nonlinear = ("a", "b", "c")
    bounds = Clark.bounds[:3]
    saturates = False


class ClarkPower(Clark):
    """L = E + 10^d N^a E^b: a power law in size and in experts, the simplest law of routed models."""

    name = "clark_power"
    source = "Clark et al., arXiv:2202.01169, eq. 1, with a floor and c = 0"
    nonlinear = ("a", "b")
    bounds = Clark.bounds[:2]
    interaction = saturates = False


class Ludziejewski(Monomials):
    """L = a Ehat^delta N^(alpha + gamma ln Ehat) + b Ehat^omega D^(beta + zeta ln Ehat) + c, N being active parameters.

    Dense and sparse models in one law (E = 1: dense). Ehat saturates as in Clark's, with E_start and E_max fixed: a
    joint sweep has too few values of E to determine them, and over few values the six exponents absorb their effect.
    """

    name = "ludziejewski"
    source = "Ludziejewski et al., arXiv:2502.05172"
    counts = "active"
    needs = ("n", "d", "experts")
    linear = ("E", "a", "b")
    nonlinear = ("delta", "alpha", "gamma", "omega", "beta", "zeta")
    bounds = ((-0.6, 0.2), (-0.9, -0.02), (-0.05, 0.05), (-0.6, 0.2), (-0.9, -0.02), (-0.05, 0.05))
    """Of delta and omega at N_REF and D_REF."""
    saturation: ClassVar[tuple[float, float]] = (2.0, 300.0)
    """E_start and E_max, near what Clark et al. found for S-BASE."""

    def exponents(self, x: Columns) -> Array:
        ln_n, ln_d, ln_e = np.log(x["n"]), np.log(x["d"]), np.log(saturated(x["experts"], *self.saturation))
        z = np.zeros((3, 6, len(ln_n)))
        z[1, :3] = ln_e, ln_n, ln_e * (ln_n - np.log(N_REF))
        z[2, 3:] = ln_e, ln_d, ln_e * (ln_d - np.log(D_REF))
        return z

    def coefficients(self, parameters: Array) -> dict[str, float]:
        found = super().coefficients(parameters)
        found["delta"] -= found["gamma"] * np.log(N_REF)
        found["omega"] -= found["zeta"] * np.log(D_REF)
        return {"c" if name == "E" else name: float(value) for name, value in found.items()}

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        given = {**coefficients, "E": coefficients["c"]}
        given["delta"] += given["gamma"] * np.log(N_REF)
        given["omega"] += given["zeta"] * np.log(D_REF)
        return super().parameters(given)


class Abnar(Monomials):
    """L = a / N^alpha + b / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma) + e, N being all parameters.

    1 - S = top_k / experts is the share of the experts that a token passes, `active_ratio` (1: dense). The paper's own
    lambda is negative. With lambda at 0 the terms c and e merge, and only their sum is meaningful.
    """

    name = "abnar"
    source = "Abnar et al., arXiv:2501.12370, eq. 6"
    counts = "total"
    needs = ("n", "d", "active_ratio")
    linear = ("E", "a", "b", "c", "d")
    nonlinear = ("alpha", "beta", "lambda", "delta", "gamma")
    bounds = ((0.02, 1.5), (0.02, 1.5), (-1.0, 1.0), (-0.5, 1.5), (0.02, 1.5))

    def exponents(self, x: Columns) -> Array:
        ln_n, ln_d, ln_share = np.log(x["n"]), np.log(x["d"]), np.log(x["active_ratio"])
        z = np.zeros((5, 5, len(ln_n)))
        z[1, 0], z[2, 1], z[3, 2] = -ln_n, -ln_d, -ln_share
        z[4, 3], z[4, 4] = -ln_share, -ln_n
        return z

    def coefficients(self, parameters: Array) -> dict[str, float]:
        return {"e" if name == "E" else name: value for name, value in super().coefficients(parameters).items()}

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        return super().parameters({**coefficients, "E": coefficients["e"]})


class Krajewski(Monomials):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta, N being all parameters without embeddings.

    G, the granularity, is how many times narrower than the dense layer an expert is. The number of experts must be the
    same multiple of G in all rows.
    """

    name = "krajewski"
    source = "Krajewski et al., arXiv:2402.07871, eq. 9"
    counts = "total"
    needs = ("n", "d", "granularity")
    linear = ("E", "g", "a", "b")
    nonlinear = ("gamma", "alpha", "beta")
    bounds = ((0.05, 3.0), (0.02, 1.5), (0.02, 1.5))

    def exponents(self, x: Columns) -> Array:
        ln_n = np.log(x["n"])
        z = np.zeros((4, 3, len(ln_n)))
        z[1, 0], z[1, 1], z[2, 1] = -np.log(x["granularity"]), -ln_n, -ln_n
        z[3, 2] = -np.log(x["d"])
        return z

    def coefficients(self, parameters: Array) -> dict[str, float]:
        return {"c" if name == "E" else name: value for name, value in super().coefficients(parameters).items()}

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        return super().parameters({**coefficients, "E": coefficients["c"]})


MOE_FORMS: tuple[Form, ...] = (
    ClarkPower(), ClarkUnsaturated(), ClarkSeparable(), Clark(), ClarkFloorless(), Abnar(), Ludziejewski(), Krajewski()
)  # fmt: skip

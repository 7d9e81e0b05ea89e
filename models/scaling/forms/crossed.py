"""Approach 3 with one more exponent in each term, which frees the frontier's slope from the valleys' curvature."""

from collections.abc import Mapping

import numpy as np

from .dense import Array, Columns, Monomials


class Crossed(Monomials):
    """L = E + A / (N^alpha D^alpha_D) + B / (D^beta N^beta_N): approach 3 where alpha_D = beta_N = 0.

    Args:
        n, d: where the terms equal the internal A and B, for better conditioning; `coefficients` are for N = D = 1.
    """

    name = "crossed"
    source = "Hoffmann et al., arXiv:2203.15556, eq. 2, with one more exponent in each term"
    needs = ("n", "d")
    linear = ("E", "A", "B")
    nonlinear = ("alpha", "beta", "alpha_D", "beta_N")
    bounds = ((0.01, 2.0), (0.01, 2.0), (-0.6, 0.6), (-0.6, 0.6))

    def __init__(self, n: float = 1.0, d: float = 1.0, interaction: float = np.inf) -> None:
        self.log_n, self.log_d, self.interaction = np.log(n), np.log(d), interaction

    @property
    def scales(self) -> tuple[float, ...]:
        return np.inf, np.inf, self.interaction, self.interaction

    def exponents(self, x: Columns) -> Array:
        z = np.zeros((3, 4, len(x["n"])))
        z[1, 0] = z[2, 3] = self.log_n - np.log(x["n"])
        z[2, 1] = z[1, 2] = self.log_d - np.log(x["d"])
        return z

    def coefficients(self, parameters: Array) -> dict[str, float]:
        found = super().coefficients(parameters)
        found["A"] *= float(np.exp(found["alpha"] * self.log_n + found["alpha_D"] * self.log_d))
        found["B"] *= float(np.exp(found["beta"] * self.log_d + found["beta_N"] * self.log_n))
        return found

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        found = super().parameters({"alpha_D": 0.0, "beta_N": 0.0} | dict(coefficients))
        found[1] -= found[3] * self.log_n + found[5] * self.log_d
        found[2] -= found[4] * self.log_d + found[6] * self.log_n
        return found

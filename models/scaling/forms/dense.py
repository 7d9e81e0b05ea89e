"""Functional forms of scaling laws: what a fit may assume of the loss as a function of size, tokens and FLOPs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Columns = Mapping[str, Array]
"""Columns of a table by name (n, d, c, experts, ...), each of shape (rows,)."""
D_REF = 1e9
"""Tokens at which gamma holds the exponents that depend on D."""


class Form:
    """L = (sum_j theta_j phi_j(x; gamma)) ** power, with theta_j > 0 and phi_j > 0.

    A parameter vector is (ln theta_1, ..., gamma_1, ...), shape (J + G,). Shapes: B parameter vectors at once, J terms,
    G entries of gamma. All forms of the literature that are fitted here are such sums, which is what makes the search
    for their global optimum cheap: given gamma, theta is a non-negative least-squares problem.
    """

    name: str
    source: str
    needs: tuple[str, ...]
    """Columns of the table."""
    linear: tuple[str, ...]
    """Names of theta in the literature; "E" is the irreducible loss."""
    nonlinear: tuple[str, ...]
    """Names of gamma."""
    bounds: tuple[tuple[float, float], ...]
    """Of each gamma: the search's grid lies inside, and no fit leaves them."""

    @property
    def scales(self) -> tuple[float, ...]:
        """Standard deviation of each gamma's normal prior about zero; infinite: flat."""
        return (np.inf,) * len(self.nonlinear)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return len(self.linear) + len(self.nonlinear)

    def log_terms(self, gamma: Array, x: Columns) -> Array:
        """ln phi, shape (B, J, rows), for gamma of shape (B, G)."""
        raise NotImplementedError

    def gradients(self, gamma: Array, x: Columns) -> Array:
        """d ln phi / d gamma, shape (B or 1, J, G, rows); here by central differences."""
        columns = []
        for g in range(gamma.shape[1]):
            step = 1e-5 * np.maximum(1.0, np.abs(gamma[:, g : g + 1]))
            up, down = gamma.copy(), gamma.copy()
            up[:, g : g + 1] += step
            down[:, g : g + 1] -= step
            columns.append((self.log_terms(up, x) - self.log_terms(down, x)) / (2 * step[:, :, None]))
        return np.stack(columns, axis=2)

    def power(self, gamma: Array) -> Array:
        """The outer exponent, shape (B,)."""
        return np.ones(len(gamma))

    def power_gradient(self, gamma: Array) -> Array:
        """d power / d gamma, shape (B, G)."""
        return np.zeros_like(gamma)

    def log_loss(self, parameters: Array, x: Columns) -> Array:
        """ln L, shape (B, rows), for parameters of shape (B, J + G)."""
        theta, gamma = parameters[:, : len(self.linear)], parameters[:, len(self.linear) :]
        terms = theta[:, :, None] + self.log_terms(gamma, x)
        top = terms.max(axis=1)
        return self.power(gamma)[:, None] * (top + np.log(np.exp(terms - top[:, None]).sum(axis=1)))

    def coefficients(self, parameters: Array) -> dict[str, float]:
        """One parameter vector under the literature's names."""
        terms = len(self.linear)
        values = [*np.exp(parameters[:terms]), *parameters[terms:]]
        return {name: float(value) for name, value in zip(self.linear + self.nonlinear, values, strict=True)}

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        """The parameter vector of coefficients under the literature's names, shape (J + G,)."""
        return np.array(
            [np.log(coefficients[name]) for name in self.linear] + [coefficients[name] for name in self.nonlinear]
        )


class Monomials(Form):
    """A form whose terms are products of powers, ln phi_j = sum_g gamma_g z_jg(x): its gradients are constant."""

    def exponents(self, x: Columns) -> Array:
        """z, shape (J, G, rows)."""
        raise NotImplementedError

    def log_terms(self, gamma: Array, x: Columns) -> Array:
        z = self.exponents(x)
        terms, count, rows = z.shape
        flat = gamma @ z.transpose(1, 0, 2).reshape(count, terms * rows)
        return flat.reshape(len(gamma), terms, rows)

    def gradients(self, gamma: Array, x: Columns) -> Array:
        return self.exponents(x)[None]


class Approach3(Monomials):
    """L = E + A / N^alpha + B / D^beta."""

    name = "approach3"
    source = "Hoffmann et al., arXiv:2203.15556, eq. 2"
    needs = ("n", "d")
    linear = ("E", "A", "B")
    nonlinear = ("alpha", "beta")
    bounds = ((0.02, 2.0), (0.02, 2.0))

    def exponents(self, x: Columns) -> Array:
        z = np.zeros((3, 2, len(x["n"])))
        z[1, 0], z[2, 1] = -np.log(x["n"]), -np.log(x["d"])
        return z


class Kaplan(Monomials):
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, without a floor.

    Here N_c^(alpha_N/alpha_D) and D_c are the coefficients A and B; `ratio` is alpha_N / alpha_D.
    """

    name = "kaplan"
    source = "Kaplan et al., arXiv:2001.08361, eq. 1.5"
    needs = ("n", "d")
    linear = ("A", "B")
    nonlinear = ("ratio", "alpha_D")
    bounds = ((0.1, 6.0), (0.02, 1.0))

    def exponents(self, x: Columns) -> Array:
        z = np.zeros((2, 2, len(x["n"])))
        z[0, 0] = -np.log(x["n"])
        return z

    def log_terms(self, gamma: Array, x: Columns) -> Array:
        terms = super().log_terms(gamma, x)
        terms[:, 1] -= np.log(x["d"])
        return terms

    def power(self, gamma: Array) -> Array:
        return gamma[:, 1]

    def power_gradient(self, gamma: Array) -> Array:
        return np.broadcast_to(np.array([0.0, 1.0]), gamma.shape)

    def coefficients(self, parameters: Array) -> dict[str, float]:
        found = super().coefficients(parameters)
        alpha_n = found["ratio"] * found["alpha_D"]
        with np.errstate(over="ignore"):  # at the edge of its exponents N_c overflows
            n_c = float(np.exp(parameters[0] / found["ratio"]))
        return {"N_c": n_c, "D_c": found["B"], "alpha_N": alpha_n, "alpha_D": found["alpha_D"]}

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        ratio = coefficients["alpha_N"] / coefficients["alpha_D"]
        a, b = ratio * np.log(coefficients["N_c"]), np.log(coefficients["D_c"])
        return np.array([a, b, ratio, coefficients["alpha_D"]])


class Gadre(Monomials):
    """L = E + (a M^eta + b M^-eta) C^-eta, with M = D / N and C = 6 N D: one exponent for both.

    The published code writes it as E + a' N^-2eta + b' D^-2eta, which is the same.
    """

    name = "overtraining"
    source = "Gadre et al., arXiv:2403.08540, eq. 4"
    needs = ("n", "d")
    linear = ("E", "a", "b")
    nonlinear = ("eta",)
    bounds = ((0.01, 1.0),)

    def exponents(self, x: Columns) -> Array:
        z = np.zeros((3, 1, len(x["n"])))
        log_m, log_c = np.log(x["d"] / x["n"]), np.log(6 * x["n"] * x["d"])
        z[1, 0], z[2, 0] = log_m - log_c, -log_m - log_c
        return z


class DataConstrained(Form):
    """L = E + A / N'^alpha + B / D'^beta: repeated tokens, and parameters beyond what they need, are worth less.

    D' = U_D + U_D R_D (1 - exp(-(D / U_D - 1) / R_D)), with U_D the unique tokens; N' likewise from U_N, the compute-
    optimal N for U_D tokens, U_N = G (G U_D)^(beta / alpha) with G = (alpha A / (beta B))^(1 / (alpha + beta)).

    As A, B and G are tied, both terms are A times something: gamma holds ln U_N at D_REF unique tokens, which gives G,
    and that gives B.
    """

    name = "data_constrained"
    source = "Muennighoff et al., arXiv:2305.16264, eq. 5 to 7"
    needs = ("n", "d", "unique")
    linear = ("E", "A")
    nonlinear = ("alpha", "beta", "R_D", "R_N", "U_N")
    bounds = ((0.05, 1.2), (0.05, 1.2), (0.5, 100.0), (0.5, 100.0), (np.log(1e4), np.log(1e12)))

    def log_terms(self, gamma: Array, x: Columns) -> Array:
        alpha, beta, r_d, r_n, size = (gamma[:, i : i + 1] for i in range(5))
        n, d = x["n"][None], x["d"][None]
        u_d = np.minimum(x["unique"][None], d)
        u_n = np.minimum(n, np.exp(size + np.log(u_d / D_REF) * beta / alpha))
        d_worth = u_d * (1 - r_d * np.expm1(-(d / u_d - 1) / r_d))
        n_worth = u_n * (1 - r_n * np.expm1(-(n / u_n - 1) / r_n))
        of_n = -alpha * np.log(n_worth)
        of_d = _log_b_over_a(alpha, beta, size) - beta * np.log(d_worth)
        return np.stack([np.zeros_like(of_d), np.logaddexp(of_n, of_d)], axis=1)

    def coefficients(self, parameters: Array) -> dict[str, float]:
        found = super().coefficients(parameters)
        ratio = np.exp(_log_b_over_a(found["alpha"], found["beta"], found.pop("U_N")))
        e, a = found.pop("E"), found.pop("A")
        return {"E": e, "A": a, "B": a * float(ratio)} | found

    def parameters(self, coefficients: Mapping[str, float]) -> Array:
        a, b, alpha, beta = (coefficients[name] for name in ("A", "B", "alpha", "beta"))
        log_g = np.log(alpha * a / (beta * b)) / (alpha + beta)
        size = log_g + (log_g + np.log(D_REF)) * beta / alpha
        return super().parameters({**coefficients, "U_N": size})


def _log_b_over_a(alpha: Any, beta: Any, size: Any) -> Any:
    """ln B / A of the law whose compute-optimal N for D_REF tokens is exp(size)."""
    log_g = (size - np.log(D_REF) * beta / alpha) / (1 + beta / alpha)
    return np.log(alpha / beta) - (alpha + beta) * log_g

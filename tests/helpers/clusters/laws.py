"""Simulated sweeps from planted scaling laws."""

import numpy as np

from models.scaling.forms.dense import Form
from models.scaling.table import Table

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""arXiv:2203.15556, eq. 10."""


def isoflop(form: Form, law: dict[str, float], budgets=(1e18, 1e21, 6), sizes=7, noise=0.002, seed=0, **extra) -> Table:
    """Budgets (smallest, largest, number) by sizes within a factor of 5 of 20 tokens per parameter; noise on log loss.

    Args:
        extra: additional columns, drawn for each run from the given values.
    """
    generator = np.random.default_rng(seed)
    c = np.repeat(np.geomspace(*budgets), sizes)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(0.2, 5, sizes), budgets[2])
    columns = {name: generator.choice(np.array(values, dtype=float), len(c)) for name, values in extra.items()}
    x = {"n": n, "d": c / (6 * n), "c": c} | columns
    loss = np.exp(form.log_loss(form.parameters(law)[None], x)[0] + generator.normal(0, noise, len(c)))
    return Table(n, x["d"], c, loss, extra=columns)

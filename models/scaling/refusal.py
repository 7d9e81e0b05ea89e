"""Why a fit is refused: a machine-readable kind, and a message."""

from collections.abc import Mapping, Sequence
from typing import Literal

from configs import ConfigError

from .forms.dense import Form

Kind = Literal[
    "edge", "concave", "few_sizes", "few_budgets", "few_rows", "mixed_recipes", "floor", "columns", "convergence",
    "repeats", "few_kinds", "kind",
]  # fmt: skip


class Refusal(ConfigError):
    """Data that a law cannot honestly be fitted to.

    Attributes:
        kind: `edge`: the optimum lies at the grid's edge; `concave`: the parabola opens downwards; `few_sizes`,
            `few_budgets`, `few_rows`: fewer than the form needs; `mixed_recipes`: losses that cannot be compared;
            `floor`: E (or another coefficient) is at its bound; `columns`: something that the form needs is not in
            the table; `convergence`: no optimum was reached; `repeats`: the value of repeated tokens is unknown;
            `few_kinds`: fewer kinds of models than a law of all of them needs; `kind`: a kind that is not fully said.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def edge(form: Form, at_bound: Sequence[str]) -> Refusal | None:
    """Why a fit with coefficients at the edge of what is allowed cannot be relied on; None: it has none."""
    if not at_bound:
        return None
    which = " and ".join(at_bound)
    return Refusal("floor", f"{form.name}: {which} at the edge of what is allowed; the data do not determine it")


def refused(each: Mapping[str, Refusal], conclusion: str) -> Refusal:
    """Combines the refusals of all forms, or of all kinds of models, into one."""
    first, *others = each.values()
    if not others:
        return first
    return Refusal(first.kind, "\n".join([f"{conclusion}:", *(f"  {why}" for why in each.values())]))

"""Why a fit is refused: a kind that a program can tell, and words for a person."""

from typing import Literal

from configs import ConfigError

Kind = Literal[
    "edge", "concave", "few_sizes", "few_budgets", "few_rows", "mixed_recipes", "floor", "columns", "convergence"
]


class Refusal(ConfigError):
    """Data that a law cannot honestly be fitted to.

    Attributes:
        kind: `edge`: the optimum lies at the grid's edge; `concave`: the parabola opens downwards; `few_sizes`,
            `few_budgets`, `few_rows`: less than the form has to be told by; `mixed_recipes`: losses that cannot be
            compared; `floor`: E (or another coefficient) stands at its bound; `columns`: something the form needs is
            not in the table; `convergence`: no optimum was reached.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

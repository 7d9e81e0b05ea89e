"""The architectures that a sweep compares: dense, or MoE in the terms of the literature."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from configs.base import Section, Size

from .designs import MOST_TRIALS, listed


class Experts(NamedTuple):
    """The experts of an MoE layer, as `model.*` counts them."""

    num_experts: int
    top_k: int
    granularity: int
    """Width of the dense layer / width of an expert (Krajewski et al., arXiv:2402.07871)."""
    shared: int


class Variant(Section):
    """One architecture, resized for each budget; no key: dense. Every combination of the lists is a variant."""

    experts: tuple[Size, ...] = ()
    """Experts at granularity 1, where each is as wide as the dense layer."""
    top_k: tuple[Size, ...] = ()
    """Experts per token, of those; default 1."""
    granularity: tuple[Size, ...] = (1,)
    """G: each expert is split into G narrower ones, and a token uses G times as many: experts * G in all, top_k * G
    active, of width / G."""
    sparsity: tuple[float, ...] = ()
    """1 - active / total experts (Abnar et al., arXiv:2501.12370), in place of experts or top_k."""
    shared: int = Field(0, ge=0, le=2**20)
    """Shared experts that every token passes through in addition, each as wide as the others."""
    set: dict[str, Any] = {}
    """Config keys of this variant, nested or dotted."""

    _lists = field_validator("experts", "top_k", "granularity", "sparsity", mode="before")(listed)

    @model_validator(mode="after")
    def _check(self):
        lists = (self.experts, self.top_k, self.granularity, self.sparsity)
        if (many := math.prod(len(values) or 1 for values in lists)) > MOST_TRIALS:
            raise ValueError(f"the lists have {many:,} combinations: at most {MOST_TRIALS:,}")
        if any(not 0 <= value < 1 for value in self.sparsity):
            raise ValueError(
                f"sparsity {list(self.sparsity)} is 1 - active / total experts: it should be from 0 to below 1"
            )
        if self.experts and self.top_k and self.sparsity:
            raise ValueError("sparsity follows from experts and top_k: leave one of the three out")
        if not self.is_moe and (self.top_k or self.shared or self.granularity != (1,)):
            raise ValueError("top_k, granularity and shared need experts: set experts or sparsity")
        self.choices()
        return self

    @property
    def is_moe(self) -> bool:
        return bool(self.experts or self.sparsity)

    def choices(self) -> dict[str, Experts | None]:
        """{suffix that tells a variant from the others, such as "-e8-g2": experts}; None: dense. Raises ValueError."""
        if not self.is_moe:
            return {"": None}
        found: dict[str, Experts | None] = {}
        for g in self.granularity:
            for e, k, s in self._expert_counts():
                why = "" if s is None else f" for sparsity {s:g}"
                experts = _whole(e * g, f"experts{why}, times granularity {g},")
                top_k = _whole(k * g, f"top_k{why}, times granularity {g},")
                if top_k > experts:
                    raise ValueError(f"top_k {k:g} is more than experts {e:g}")
                several: dict[str, tuple[Sequence[float], float]] = {
                    "e": (self.experts, e), "k": (self.top_k, k), "g": (self.granularity, g),
                    "s": (self.sparsity, s or 0.0),
                }  # fmt: skip
                label = "".join(f"-{sign}{value:g}" for sign, (values, value) in several.items() if len(values) > 1)
                found[label] = Experts(experts, top_k, g, self.shared)
        return found

    def _expert_counts(self) -> list[tuple[float, float, float | None]]:
        """(experts, top_k, sparsity if it was given) of each combination."""
        ks: tuple[float, ...] = self.top_k or (1,)
        if not self.sparsity:
            return [(e, k, None) for e in self.experts for k in ks]
        if self.experts:
            return [(e, e * (1 - s), s) for e in self.experts for s in self.sparsity]
        return [(k / (1 - s), k, s) for k in ks for s in self.sparsity]


def _whole(value: float, what: str) -> int:
    nearest = round(value)
    if nearest < 1 or abs(value - nearest) > 1e-6 * nearest:
        raise ValueError(f"{what} is {value:.4g}, not a whole number of at least 1")
    return nearest

"""From parameters and budgets to shapes, steps and batches, by exact counts (models/planning/cost.py)."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from configs import ConfigError, ModelConfig
from configs.sections.model import MOST_LAYERS, MOST_WIDTH
from configs.sweep.definition import ShapeRule
from configs.sweep.variants import Experts
from models.planning.cost import Parameters, parameters, training_flops_per_token

TOLERANCE = 0.01
"""Largest relative difference between a trial's FLOPs and its budget."""
MOST_SHAPES = 20_000
"""Shapes compared at most to find one of a given size: about a second's work. With usual head sizes there are hundreds.
"""
MOST_BATCHES = 100_000
"""Batch sizes tried at most on either side of the desired one to find one that spends the budget."""
DEPTH_WEIGHT = 0.05
"""Weight of missing the aspect ratio against missing the size: decides between shapes that are about equally close."""


def conventions(counts: Parameters) -> dict[str, int]:
    """N by every convention that a sweep knows; see `configs.sweep.definition.Count`."""
    return {
        "total": counts.total,
        "active": counts.active,
        "without_embeddings": counts.active - counts.embedding - counts.head,
        "with_head": counts.active - (counts.embedding if counts.head else 0),
    }


class Sizer:
    """Finds the shapes of one architecture.

    Args:
        model: what a shape does not decide: vocabulary, router, window, ...; its vocab_size is set.
        experts: None: dense.
        multiple: the width of the dense layer is a multiple of it, so that every granularity of the sweep divides it.
        count: the convention that parameters are counted by.
    """

    def __init__(
        self, model: ModelConfig, rule: ShapeRule, experts: Experts | None, multiple: int, count: str, seq_len: int
    ) -> None:
        assert model.vocab_size
        self._model, self._rule, self._experts, self._multiple = model, rule, experts, multiple
        self._count, self._seq_len = count, seq_len
        self._unit = rule.head_dim * rule.kv_group

    def keys(self, hidden: int, layers: int) -> dict[str, Any]:
        """Keys of `model` that make this shape."""
        rule, experts = self._rule, self._experts
        multiple = math.lcm(rule.ffn_multiple, self._multiple)
        width = max(1, math.ceil(rule.ffn_ratio * hidden / multiple - 1e-9)) * multiple
        heads = hidden // rule.head_dim
        found = {
            "hidden_size": hidden, "num_layers": layers, "num_heads": heads, "num_kv_heads": heads // rule.kv_group,
            "head_dim": rule.head_dim, "intermediate_size": width, "num_experts": 0, "shared_expert_size": 0,
        }  # fmt: skip
        if experts:
            size = width // experts.granularity
            found |= {"num_experts": experts.num_experts, "top_k": experts.top_k, "expert_size": size}
            found["shared_expert_size"] = experts.shared * size
        return found

    def model(self, keys: dict[str, Any]) -> ModelConfig:
        """The model of a shape, resolved as far as its cost requires."""
        return self._model.model_copy(update=keys)

    def n(self, keys: dict[str, Any]) -> int:
        """Parameters of a shape."""
        return conventions(parameters(self.model(keys)))[self._count]

    def flops(self, keys: dict[str, Any]) -> float:
        """Training FLOPs per token of a shape."""
        return training_flops_per_token(self.model(keys), self._seq_len)

    def by_rule(self, units: int) -> dict[str, Any]:
        """The shape whose width is `units` times the smallest one, with the depth that the aspect ratio gives."""
        hidden = units * self._unit
        return self.keys(hidden, self._depth(hidden))

    def shape(self, target: float, taken: Collection[tuple[int, int]] = ()) -> dict[str, Any]:
        """The keys of the shape whose parameters are nearest to `target`.

        Args:
            taken: (hidden_size, num_layers) of shapes that must not be used again.

        Raises:
            ConfigError: the target is under four fifths of the smallest shape.
        """
        smallest = self.keys(self._unit, self._rule.min_layers)
        if target < 0.8 * (least := self.n(smallest)):
            raise ConfigError(
                f"a size of {target:.3g} ({self._count} parameters) is below the smallest shape's {least:,}, hidden "
                f"{self._unit} and {self._rule.min_layers} layers: lower shape.head_dim (now {self._rule.head_dim}), "
                "shape.min_layers or the vocabulary, or ask for larger sizes"
            )
        middle = self._units_at(lambda keys: self.n(keys) >= target)
        best, best_off, seen = smallest, math.inf, 0
        for units in range(max(1, math.floor(0.85 * middle) - 1), math.ceil(1.15 * middle) + 2):
            hidden = units * self._unit
            ideal = self._depth(hidden)
            low = max(self._rule.min_layers, math.floor(ideal * (1 - self._rule.slack)))
            high = min(MOST_LAYERS, max(ideal + 1, math.ceil(ideal * (1 + self._rule.slack))))
            for layers in range(min(low, max(self._rule.min_layers, ideal - 1)), high + 1):
                if (seen := seen + 1) > MOST_SHAPES:
                    raise ConfigError(
                        f"over {MOST_SHAPES:,} shapes are near a size of {target:.3g} ({self._count} parameters): "
                        f"raise shape.head_dim (now {self._rule.head_dim}), or lower shape.slack"
                    )
                keys = self.keys(hidden, layers)
                off = abs(math.log(self.n(keys) / target)) + DEPTH_WEIGHT * abs(math.log(layers / ideal))
                if off < best_off and (hidden, layers) not in taken:
                    best, best_off = keys, off
        return best

    def centre(self, budget: float, tokens_per_parameter: float) -> float:
        """The number of parameters for which `budget` FLOPs buy `tokens_per_parameter` tokens each, interpolated
        between two shapes of the rule. Raises ConfigError if the smallest shape is too large for the budget."""

        def ratio(keys: dict[str, Any]) -> float:
            return budget / self.flops(keys) / self.n(keys)

        smallest = self.by_rule(1)
        if ratio(smallest) < tokens_per_parameter:
            tokens = budget / self.flops(smallest)
            raise ConfigError(
                f"a budget of {budget:.3g} FLOPs is too small for {tokens_per_parameter:g} tokens per parameter: the "
                f"smallest shape, hidden {self._unit}, has {self.n(smallest):,} {self._count} parameters, and sees "
                f"{tokens:.3g} tokens ({ratio(smallest):.2g} each). Raise isoflop.budgets to "
                f"{self.n(smallest) * tokens_per_parameter * self.flops(smallest):.2g}, or lower shape.head_dim"
            )
        units = self._units_at(lambda keys: ratio(keys) < tokens_per_parameter)
        low, high = self.by_rule(units - 1), self.by_rule(units)
        share = math.log(ratio(low) / tokens_per_parameter) / math.log(ratio(low) / ratio(high))
        return self.n(low) * (self.n(high) / self.n(low)) ** share

    def _depth(self, hidden: int) -> int:
        return min(MOST_LAYERS, max(self._rule.min_layers, round(hidden / self._rule.aspect_ratio)))

    def _units_at(self, reached: Any) -> int:
        """The fewest units whose shape by the rule satisfies `reached`, which holds from some size on.

        Raises ConfigError if no model is that wide.
        """
        high = 1
        while not reached(self.by_rule(high)):
            high *= 2
            if high * self._unit > MOST_WIDTH:
                raise ConfigError(f"this needs a model.hidden_size of over {MOST_WIDTH:,}: ask for smaller sizes")
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(self.by_rule(middle)) else (middle, high)
        return high


def spaced(centre: float, spread: float, sizes: int) -> list[float]:
    """Sizes from centre / spread to centre * spread, evenly spaced in the logarithm."""
    if sizes == 1:
        return [centre]
    return [centre * spread ** (2 * i / (sizes - 1) - 1) for i in range(sizes)]


def batch_and_steps(
    sequences: Sequence[float], wanted: float, multiple: int, *, fixed: bool = False
) -> tuple[int, list[int]] | None:
    """A global batch, and each run's steps with it, so that each reads its number of sequences within TOLERANCE.

    Args:
        sequences: number of sequences that each run should read.
        wanted: desired batch, in sequences; the closest one (in the logarithm) that fits is taken.
        multiple: the batch is a multiple of this.
        fixed: the batch is `wanted` itself.

    Returns:
        None if there is no such batch.
    """
    if fixed:
        candidates = [int(wanted)]
    else:
        most = max(1, math.floor(min(4 * max(wanted, multiple), min(sequences) * (1 + TOLERANCE)) / multiple))
        near = max(1, min(most, round(wanted / multiple)))
        tried = range(max(1, near - MOST_BATCHES), min(most, near + MOST_BATCHES) + 1)
        candidates = sorted((m * multiple for m in tried), key=lambda b: abs(math.log(b / wanted)))
    for batch in candidates:
        steps = [max(1, round(each / batch)) for each in sequences]
        if all(abs(n * batch / each - 1) <= TOLERANCE for n, each in zip(steps, sequences, strict=True)):
            return batch, steps
    return None

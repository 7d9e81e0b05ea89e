"""A preset's values that depend on a key which the user changed: they are adjusted to it."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .base import LARGEST


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree's values: `train.steps`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def follow(tree: dict[str, Any], preset: Mapping[str, Any], given: Iterable[str]) -> dict[str, str]:
    """Change in `tree` what a preset says and a key that the user gave contradicts.

    Args:
        tree: the user's keys over the preset's, not validated.
        preset: its keys.
        given: those of the user, dotted.

    Returns:
        Why each value that is still the preset's choice is what it is, by its key; empty: it is the preset's own.
    """
    defaults = dict.fromkeys(set(dotted(preset)) - set(given), "")
    for key, changed, other, why in RULES:
        value, cause = _whole(_get(tree, key)), _whole(_get(tree, changed))
        if key not in defaults or cause == _get(preset, changed) or (new := other(value, cause, tree, preset)) == value:
            continue
        section, _, last = key.partition(".")
        tree[section][last] = new
        defaults[key] = f"{why} {changed}={cause} (the preset's {value} does not fit)"
    return defaults


def _get(tree: Mapping[str, Any], key: str) -> Any:
    section, _, last = key.partition(".")
    keys = tree.get(section)
    return keys.get(last) if isinstance(keys, dict) else None


def _whole(value: Any) -> Any:
    """A whole number that is written as `1e3` or in quotes; any other value unchanged."""
    if isinstance(value, float | str):
        with contextlib.suppress(ValueError):
            return int(float(value)) if float(value).is_integer() else value
    return value


def _counts(*values: Any) -> bool:
    """Whether all are whole numbers within a config's bounds; validation explains those that are not."""
    return all(type(value) is int and 0 < value <= LARGEST for value in values)


def _warmup(warmup: Any, steps: Any, tree: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    """At most a tenth of the run, if that is shorter than the preset's."""
    shorter = _counts(warmup, steps) and steps < (_get(preset, "train.steps") or 0)
    return min(warmup, steps // 10) if shorter else warmup


def _heads(heads: Any, width: Any, tree: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    """The divisor of the width that keeps each head's width closest to the preset's."""
    before = _get(preset, "model.hidden_size")
    if not _counts(heads, width, before) or _get(tree, "model.head_dim") is not None or width % heads == 0:
        return heads
    possible = [count for count in range(1, min(width, 1024) + 1) if width % (2 * count) == 0]
    return min(possible, key=lambda count: abs(math.log(width / count * heads / before)), default=heads)


def _kv_heads(kv_heads: Any, heads: Any, tree: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    return math.gcd(kv_heads, heads) if _counts(kv_heads, heads) else kv_heads


def _top_k(top_k: Any, experts: Any, tree: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    return min(top_k, experts) if _counts(top_k, experts) else top_k


def _micro_batch(size: Any, batch: Any, tree: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    dp = _get(tree, "parallel.dp") or 1
    return None if _counts(size, batch, dp) and size > -(-batch // dp) else size  # None: resolve derives it


def _dp(dp: Any, workers: Any, tree: Mapping[str, Any], preset: Mapping[str, Any]) -> Any:
    return 1  # resolve derives it


RULES: tuple[tuple[str, str, Callable[..., Any], str], ...] = (
    ("optim.warmup", "train.steps", _warmup, "a tenth of"),
    ("model.num_heads", "model.hidden_size", _heads, "divides"),
    ("model.num_kv_heads", "model.num_heads", _kv_heads, "divides"),
    ("model.top_k", "model.num_experts", _top_k, "at most"),
    ("parallel.dp", "cluster.workers", _dp, "of"),
    ("train.micro_batch", "train.global_batch", _micro_batch, "of"),
)
"""Key of a preset, the key that it depends on, the other one's value beside it, and how they are related."""

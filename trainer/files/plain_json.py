"""One line of JSON from what a training process has at hand: numpy, torch, paths, numbers that are not finite."""

import json
import math
import os
from typing import Any


def dump(line: dict[str, Any]) -> str:
    try:
        return json.dumps(line, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(line), allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars, without importing either
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot stand in the record: {value!r}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else _finite(_plain(value))

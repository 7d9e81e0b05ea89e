"""One line of JSON from values of a training process: numpy, torch, paths, non-finite numbers."""

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
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else _finite(_plain(value))

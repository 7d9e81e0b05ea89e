"""What tells runs apart."""

from collections.abc import Mapping, Sequence
from typing import Any

OF_ONE_RUN = ("run.name", "run.root")
"""Keys that differ between any two runs."""


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each key that has not the same value in all flat configs, with the value of each; None: it has none."""
    names = dict.fromkeys(key for config in configs for key in config if key not in OF_ONE_RUN)
    return [
        {"key": key, "values": [config.get(key) for config in configs]}
        for key in names
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]

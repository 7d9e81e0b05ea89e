"""Records and events as the flat metrics and tags that trackers take."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from ..notable import notable

EXPERT_METRICS = 512
"""Expert loads of a step shown one by one; above, the largest and smallest of each layer."""
ROUTER_METRICS = {
    "expert_maxvio": max,
    "expert_dead": max,
    "router_entropy": min,
    "router_confidence": max,
    "dropped": max,
}
"""One value for each MoE layer, and which of them is the worst."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record: every number, and lists under numbered names.

    `expert_load/layer_00/expert_03`; of each of `ROUTER_METRICS` `expert_maxvio/layer_00` and so on for every MoE
    layer, `expert_maxvio/mean` and `expert_maxvio/worst`, which compare runs of different depths. Of `rank_time`, which
    may be of a thousand ranks, the largest and the median.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, (int, float)) and key not in ("step", "time"):
            found[key] = float(value)
        elif key in ROUTER_METRICS:
            layers = {f"layer_{i:02d}": float(item) for i, item in enumerate(value) if item is not None}
            if layers:
                layers |= {"mean": fmean(layers.values()), "worst": ROUTER_METRICS[key](layers.values())}
            found |= {f"{key}/{name}": item for name, item in layers.items()}
        elif key == "rank_time":
            found |= {f"{key}/max": max(value), f"{key}/median": median(value)}
        elif key == "expert_load":
            few = sum(map(len, value)) <= EXPERT_METRICS
            for i, layer in enumerate(value):
                shares = {f"expert_{e:02d}": share for e, share in enumerate(layer) if share is not None}
                if not few and shares:
                    shares = {"max": max(shares.values()), "min": min(shares.values())}
                found |= {f"expert_load/layer_{i:02d}/{name}": share for name, share in shares.items()}
    return found


def tags(details: Mapping[str, Any]) -> dict[str, str]:
    """`attempt_started` as tags; nested details under dotted names."""
    found: dict[str, str] = {}
    for key, value in details.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": str(item) for name, item in value.items()}
        elif isinstance(value, (str, int, float)) and key not in ("event", "time"):
            found[key] = str(value)
    for key in ("commit", "dirty"):
        if value := found.get(f"git_{key}"):
            found[f"mlflow.source.git.{key}"] = value  # MLflow's own names, which its UI shows
    return found


def notable_tags(events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a person should know of a run (`trainer.notable`), a tag for each kind: `muster.policy`, `muster.hang`."""
    found = {}
    for kind, each in notable(events).items():
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(each.time))
        found[f"muster.{kind}"] = f"{each.text} ({each.times} in all, the last in attempt {each.attempt}, {when})"
    return found

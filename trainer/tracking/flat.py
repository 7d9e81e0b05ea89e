"""Records and events as the flat metrics and tags that trackers take."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from trainer.record.notable import notable

NAMES = {
    "attempt": "run_attempt",
    "aux_loss": "router_aux_loss",
    "z_loss": "router_z_loss",
    "data_wait": "time_data_wait",
    "step_time": "time_step",
    "rank_time": "time_rank",
    "eval_tokens": "tokens_evaluated",
    "expert_maxvio": "router_maxvio",
    "expert_dead": "router_dead_experts",
    "dropped": "router_dropped",
}
"""Their names in the tracker. MLflow's page sorts charts by name, those with a / in the name before all others except
`system/`, which comes last: so no other name has one, and the losses come first."""
ROUTER_METRICS = {
    "expert_maxvio": max,
    "expert_dead": max,
    "router_entropy": min,
    "router_confidence": max,
    "dropped": max,
}
"""Metrics with one value per MoE layer, and the function that picks the worst."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record: its numbers, under the names of `NAMES`.

    Each of `ROUTER_METRICS` becomes its mean and its worst over the MoE layers, so that runs of different depths
    compare; `rank_time`, which may have a thousand ranks, its maximum and median. The loads of single experts are left
    to the plots in `plots/`: hundreds of charts would hide the others.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        name = NAMES.get(key, key)
        if isinstance(value, (int, float)) and key not in ("step", "time"):
            found[name] = float(value)
        elif key in ROUTER_METRICS:
            layers = [float(item) for item in value if item is not None]
            found |= {f"{name}_mean": fmean(layers), f"{name}_worst": ROUTER_METRICS[key](layers)} if layers else {}
        elif key == "rank_time":
            found |= {f"{name}_max": max(value), f"{name}_median": median(value)}
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
    """A run's notable events (`trainer.record.notable`), one tag for each kind: `muster.policy` and so on."""
    found = {}
    for kind, each in notable(events).items():
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(each.time))
        found[f"muster.{kind}"] = f"{each.text} ({each.times} in all, the last in attempt {each.attempt}, {when})"
    return found

"""`/metrics`: how the runs that are being trained stand, in Prometheus' text format."""

from collections import Counter
from collections.abc import Mapping
from typing import get_args

from ...messages import State
from ..index.runs_index import View
from .now import Glance

STATES = get_args(State)
STATUSES = ("RUNNING", "FINISHED", "FAILED", "STOPPED", "NEW", "UNREADABLE")
"""They are told at 0 too: an alert on what is absent would never fire."""
GAUGES = (
    ("muster_run_step", "Last step that is recorded.", "step"),
    ("muster_run_loss", "Training loss of that step.", "loss"),
    ("muster_run_tokens_per_second", "Tokens per second of that step, of all processes.", "tokens_per_second"),
    ("muster_run_mfu", "Share of the devices' peak FLOP/s.", "mfu"),
)


def exposition(view: View, glance: Glance, jobs: Mapping[str, int] | None = None) -> str:
    """All gauges, of runs that are being trained, and how many runs there are by status.

    Args:
        jobs: how many there are in each state, where the server has a queue.
    """
    running = [entry for entry in view.entries if entry.row.status == "RUNNING"]
    lines: list[str] = []

    def gauge(name: str, what: str, values: list[tuple[dict[str, str], float | int | None]]) -> None:
        lines.extend([f"# HELP {name} {what}", f"# TYPE {name} gauge"])
        for labels, value in values:
            if value is not None:
                told = ",".join(f'{label}="{_escaped(of)}"' for label, of in labels.items())
                lines.append(f"{name}{{{told}}} {value}")

    for name, what, key in GAUGES:
        gauge(name, what, [({"run": entry.row.id}, getattr(entry.row, key)) for entry in running])
    gauge(
        "muster_run_rate",
        "Tokens, images or what else the run counts, per second of that step, of all processes.",
        [({"run": entry.row.id, "unit": entry.row.unit}, entry.row.rate) for entry in running],
    )
    gauge(
        "muster_run_goodput",
        "Share of the time that went into steps that count.",
        [({"run": entry.row.id}, glance.goodput(entry)) for entry in running],
    )
    counted = Counter(entry.row.status for entry in view.entries)
    gauge(
        "muster_runs",
        "Runs by status.",
        [({"status": status}, counted[status]) for status in dict.fromkeys((*STATUSES, *counted))],
    )
    if jobs is not None:
        gauge("muster_jobs", "Jobs of the queue by state.", [({"state": each}, jobs.get(each, 0)) for each in STATES])
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

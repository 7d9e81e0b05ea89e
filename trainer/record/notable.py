"""What a user should know of a run besides its numbers: failures, decisions, slow ranks, in a few words each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from configs.reading.parse import clip

Event = Mapping[str, Any]

KINDS = (
    "policy", "hang", "worker_lost", "worker_failed", "failure", "preflight", "straggler", "experts_collapsed",
    "checkpoint_failed", "checkpoint_refused", "skipped_step", "spike", "rollback", "bad_page", "not_written",
    "ema_changed",
)  # fmt: skip
"""The notable events, by their names in events.jsonl."""
ENDS = {"straggler_recovered": "straggler", "experts_recovered": "experts_collapsed"}
"""Events that end what another event began: the newer of the two is shown."""
LONGEST = 500
"""Characters of one text: a tracker's tags are limited (MLflow: 8000), and people read the first line."""


class Notable(NamedTuple):
    """All events of one kind in a run's record."""

    times: int
    """How often it happened, not counting the events that ended it."""
    attempt: int
    """Of the last one, like the other fields."""
    time: float
    text: str


def notable(events: Sequence[Event]) -> dict[str, Notable]:
    """The notable events by kind, in the order of `KINDS`: a pure function of the events, so replays agree."""
    found: dict[str, list[Event]] = {}
    for event in events:
        kind = ENDS.get(event["event"], event["event"])
        if kind in KINDS and (kind != "preflight" or event["broken"] or event["slow"]):
            found.setdefault(kind, []).append(event)
    told = {}
    for kind in sorted(found, key=KINDS.index):
        these, last = found[kind], found[kind][-1]
        times = sum(event["event"] == kind for event in these)
        told[kind] = Notable(times, last["attempt"], last["time"], clip(TEXTS.get(kind, _plain)(these), LONGEST))
    return told


def _policy(these: Sequence[Event]) -> str:
    return f"{these[-1]['action']}: {these[-1]['reason']}"


def _worker(these: Sequence[Event]) -> str:
    return f"rank {these[-1]['rank']}, after step {these[-1]['step']}: {these[-1]['reason']}"


def _straggler(these: Sequence[Event]) -> str:
    """The ranks that are still slow, in the last attempt that had any."""
    slow: dict[int, Event] = {}
    for event in these:
        if event["attempt"] != these[-1]["attempt"]:
            continue
        slow.pop(event["rank"], None)
        if event["event"] == "straggler":
            slow[event["rank"]] = event
    if not slow:
        return f"none since step {these[-1]['step']}; the last was rank {these[-1]['rank']} on {these[-1]['host']}"
    each = [f"rank {rank} on {event['host']} {event['times_median']:.2f}x" for rank, event in sorted(slow.items())]
    return f"{', '.join(each)} its peers' median own time, at step {these[-1]['step']}"


def _preflight(these: Sequence[Event]) -> str:
    return "; ".join([*these[-1]["broken"], *these[-1]["slow"]])


def _experts(these: Sequence[Event]) -> str:
    last = these[-1]
    where = "; ".join(f"layer {layer}: {', '.join(map(str, who))}" for layer, who in last["experts"].items())
    what = "receive tokens again" if last["event"] == "experts_recovered" else "stopped being chosen"
    return f"{last['collapsed']} collapsed after step {last['step']}, where these {what}: {where}"


def _plain(these: Sequence[Event]) -> str:
    """The reason; without one, all details."""
    last = these[-1]
    after = f"step {last['step']}: " if "step" in last else ""
    if reason := last.get("reason"):
        return f"{after}{reason}"
    left = {key: value for key, value in last.items() if key not in ("time", "attempt", "event", "step", "traceback")}
    return after + ", ".join(f"{key} {_number(value)}" for key, value in left.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reason(these: Sequence[Event]) -> str:
    return str(these[-1]["reason"])


TEXTS: dict[str, Callable[[Sequence[Event]], str]] = {
    "policy": _policy,
    "hang": _reason,
    "worker_lost": _worker,
    "worker_failed": _worker,
    "preflight": _preflight,
    "straggler": _straggler,
    "experts_collapsed": _experts,
}

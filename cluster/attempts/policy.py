"""What follows a failure: a pure function of the failures since the launch. Knows nothing of Ray."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from configs import Config, ConfigError, counted, resolve
from configs.units import byte_size
from models.planning.memory import memory

from .failures import Failure

Kind = Literal["infrastructure", "hang", "memory", "error"]
"""A process or machine that is gone, one that stands still, a device or machine without memory, an exception of the
code or data."""


class Past(NamedTuple):
    """One failure of a run.

    Attributes:
        step: last recorded step when it happened.
        saved: step of the last checkpoint then; 0: none.
    """

    kind: Kind
    step: int
    saved: int


class Decision(NamedTuple):
    """Attributes:
    reason: for the user, with the numbers it was taken by.
    """

    action: Literal["retry", "stop"]
    reason: str


def kind_of(failure: Failure) -> Kind:
    """A process that the kernel killed for memory looks as any that is gone."""
    # Of a connection that broke, only the ends are seen.
    if failure.lost or failure.collateral or failure.broken is not None:
        return "infrastructure"
    return "memory" if failure.fault == "memory" else "error"


def history(events: Sequence[dict[str, Any]]) -> list[Past]:
    """The failures of a run since its last launch, oldest first: who launches it anew starts afresh."""
    found: list[Past] = []
    saved = 0
    for event in events:
        if event["event"] == "resolved":
            found = []
        elif event["event"] == "checkpoint":
            saved = event["step"]
        elif event["event"] in ("worker_lost", "worker_failed"):
            found.append(Past(event.get("kind", "error"), event["step"], saved))
    return found


def decide(past: Sequence[Past], limit: int) -> Decision:
    """Whether to start a run again after the last of its failures.

    Infrastructure may fail as often as it likes while checkpoints get ahead (Llama 3 met 419 interruptions in 54 days,
    arXiv:2407.21783); `limit` (cluster.max_failures) counts those without a new one between. An error is given a second
    chance, for a link or a disk can fail for a moment; one that comes back without a step taken since would come back
    for ever. Memory that was too little will be too little again. A hang is most often a link or a device, and shares
    the budget of infrastructure.

    Args:
        past: oldest first, at least one.
    """
    now = past[-1]
    if now.kind == "memory":
        return Decision("stop", f"out of memory after step {now.step}")
    if now.kind == "error":
        before = [failure.step for failure in past[:-1] if failure.kind == "error"]
        if before and now.step <= max(before):
            return Decision("stop", f"failed twice in a row after step {now.step}")
        return Decision("retry", f"an error after step {now.step}, the first there")
    stuck = hung = 0
    for failure in reversed(past):
        if failure.saved != now.saved:
            break
        stuck += failure.kind in ("infrastructure", "hang")
        hung += failure.kind == "hang"
    since = f"since the checkpoint of step {now.saved}" if now.saved else "before the first checkpoint"
    hangs = f" ({hung} of them hung)" if hung else ""
    count = f"{counted(stuck, 'infrastructure failure')}{hangs} {since}, cluster.max_failures is {limit}"
    return Decision("stop" if stuck > limit else "retry", count)


def memory_advice(config: Config, cpu: bool) -> str:
    """What would need less memory by the planner, for a resolved config that ran out of it; one line."""
    now = memory(config, cpu).peak
    train, parallel = config.train, config.parallel
    assert train.micro_batch
    asked: list[dict[str, dict[str, Any]]] = []
    if train.micro_batch > 1:
        asked.append({"train": {"micro_batch": train.micro_batch // 2}})
    if train.activation_checkpointing != "full":
        asked.append({"train": {"activation_checkpointing": "full"}})
    if parallel.dp > 1:
        asked += [{"parallel": {"zero_stage": stage}} for stage in range(parallel.zero_stage + 1, 4)]
    options = []
    for change in asked:
        sections = {key: getattr(config, key).model_copy(update=value) for key, value in change.items()}
        try:
            other, _ = resolve(config.model_copy(update=sections), vocab_size=config.model.vocab_size)
        except ConfigError:
            continue
        if (peak := memory(other, cpu).peak) < now:
            [(section, values)] = change.items()
            [(key, value)] = values.items()
            options.append(f"{section}.{key}={value} ({byte_size(peak)})")
    planned = f"the plan was {byte_size(now)} per device"
    return f"{planned}; less: {', '.join(options)}" if options else f"{planned}: use more devices or a smaller model"

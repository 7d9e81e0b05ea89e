"""What follows a failure: a pure function of the failures since the launch. Knows nothing of Ray."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from configs import Config, ConfigError, counted, resolve
from configs.units import byte_size
from models.planning.cost import has_formulas
from models.planning.memory import memory

from .failures import Failure

Kind = Literal["infrastructure", "hang", "memory", "error"]
"""infrastructure: a process or machine is gone; hang: it stands still; memory: a device or machine ran out of memory;
error: an exception raised by code or data."""


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
    reason: for the user, with the numbers behind the decision.
    """

    action: Literal["retry", "stop"]
    reason: str


def kind_of(failure: Failure) -> Kind:
    """Classify a failure. A process killed by the kernel for lack of memory looks like any other that is gone."""
    # A broken connection does not tell what broke it.
    if failure.lost or failure.collateral or failure.broken is not None:
        return "infrastructure"
    return "memory" if failure.fault == "memory" else "error"


def history(events: Sequence[dict[str, Any]]) -> list[Past]:
    """The failures of a run since its last launch, oldest first: a new launch starts with a clean slate."""
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
    """Whether to restart a run after its latest failure.

    Infrastructure may fail any number of times as long as checkpoints advance (Llama 3 met 419 interruptions in 54
    days, arXiv:2407.21783); `limit` (cluster.max_failures) bounds the failures without a new checkpoint between them.
    An error gets a second chance, since a link or a disk can fail for a moment; if it recurs before another step is
    taken, it would recur forever. Running out of memory would happen again. A hang is most often caused by a link or a
    device, so it counts as infrastructure.

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
        return Decision("retry", f"first error after step {now.step}")
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
    """Changes that would need less memory according to the planner, for a resolved config that ran out; one line."""
    train, parallel = config.train, config.parallel
    assert train.micro_batch
    if not has_formulas(config.model):
        smaller = f"set train.micro_batch={train.micro_batch // 2}, or " if train.micro_batch > 1 else ""
        return f"the planner has formulas for decoders only: {smaller}lower model.*"
    now = memory(config, cpu).peak
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
    planned = f"the planner expected {byte_size(now)} per device"
    return (
        f"{planned}; less with {', '.join(options)}" if options else f"{planned}: use more devices or a smaller model"
    )

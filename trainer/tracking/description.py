"""The description of a run in its tracker: the user's note, the command, its size, a plot of its loss."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from configs import Config, counted, mask
from models.planning.cost import has_formulas, parameters

MARK = "Written by muster; replace it with your own text and it is kept."
"""Ends a description that may be replaced by a newer one."""
PICTURE = "plots/loss.png"


def description(
    config: Config, events: Sequence[Mapping[str, Any]], note: str = "", run_id: str = "", picture: bool = False
) -> str:
    """The description, in Markdown.

    Args:
        config: resolved.
        note: the user's note on the run.
        picture: the tracker's run `run_id` has a plot of the loss.
    """
    commands = [event["command"] for event in events if event["event"] == "resolved" and "command" in event]
    lines = [note] if note else []
    lines += [f"`{mask(str(commands[-1])).replace('`', '')}`"] if commands else []
    lines.append(size(config))
    if picture:
        # The URL of an artifact in MLflow's pages.
        lines.append(f"![loss](get-artifact?path={quote(PICTURE, safe='')}&run_uuid={run_id})")
    return "\n\n".join([*lines, f"<sub>{MARK}</sub>"])


def size(config: Config) -> str:
    """One sentence: parameters, tokens, processes."""
    train, parts = config.train, []
    if has_formulas(config.model) and config.model.vocab_size:
        many = parameters(config.model)
        active = "" if many.active == many.total else f" ({many.active:,} active per token)"
        parts.append(f"{counted(many.total, 'parameter')}{active}")
    tokens = train.steps * train.global_batch * train.seq_len
    if not has_formulas(config.model):
        parts.append(f"{config.model.family}, {config.task or 'its own task'}")
        parts.append(f"{counted(train.steps, 'step')} of {counted(train.global_batch, 'example')}")
        return "; ".join([*parts, f"{counted(config.parallel.world_size, 'process')}, {train.precision}"])
    parts.append(
        f"{counted(train.steps, 'step')} of {counted(train.global_batch, 'sequence')} of "
        f"{counted(train.seq_len, 'token')}: {counted(tokens, 'token')}"
    )
    parts.append(f"{counted(config.parallel.world_size, 'process')}, {train.precision}")
    return "; ".join(parts)

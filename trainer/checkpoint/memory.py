"""What a task keeps besides weights: rows of numbers in a checkpoint, tensors on the device."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from configs.reading.parse import shortened
from models.tasks.learner import Learner
from models.tasks.task import AVERAGED, Memory
from trainer.state import TrainState

Shape = tuple[int, ...]
T = TypeVar("T")
Rows = Mapping[str, list[list[float]]]


def on_device(memory: Mapping[str, list], here: torch.device) -> Memory:
    """(Nested) lists of numbers as float64 tensors."""
    return {name: torch.tensor(value, dtype=torch.float64, device=here) for name, value in memory.items()}


def as_rows(memory: Memory) -> dict[str, list[list[float]]]:
    """What a checkpoint holds of each tensor: its rows. Waits for the device."""
    return {name: value.reshape(_rows(value.shape)).tolist() for name, value in memory.items()}


def with_averages(rows: Mapping[str, T]) -> dict[str, T]:
    """A memory in which what has a moving average is that average."""
    return {**rows, **{name.removeprefix(AVERAGED): value for name, value in rows.items() if name.startswith(AVERAGED)}}


def restored(rows: Rows, fresh: Memory) -> Memory:
    """A checkpoint's memory in place of that before the first step, as far as the config asks for it."""
    found = on_device({name: rows[name] for name in fresh if name in rows}, torch.device("cpu"))
    return {name: found[name].view_as(value).to(value.device) if name in found else value
            for name, value in fresh.items()}  # fmt: skip


def wrong_shapes(memory: Mapping[str, Sequence[Sequence[float]]], learner: Learner) -> str:
    """What of some memory has another shape than this model's; empty if nothing has."""
    known = learner.known_memory()
    for name, rows in memory.items():
        if name in known and rows and not _is(rows, _rows(known[name])):
            return f"state.memory: {shortened(name)} does not have the model's shape, {list(known[name])}"
    return ""


def wrong_memory(state: TrainState, learner: Learner) -> str:
    """What of a checkpoint's state does not belong to the task and its model; empty if all does."""
    known = learner.known_memory()
    if unknown := [name for name in state.memory if name not in known]:
        return f"state.memory has {shortened(unknown[0])}, which is not remembered by this model and task"
    if wrong := wrong_shapes(state.memory, learner):
        return wrong
    if state.starved and not _is(state.starved, learner.task.counted):
        return f"state: starved does not have the model's shape, {list(learner.task.counted)}"
    return ""


def _rows(shape: Sequence[int]) -> Shape:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _is(rows: Sequence[Sequence[float]], shape: Sequence[int]) -> bool:
    return len(rows) == shape[0] and all(len(row) == shape[1] for row in rows)

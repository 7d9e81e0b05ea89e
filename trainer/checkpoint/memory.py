"""A task's memory, its state besides weights: rows of numbers in a checkpoint, tensors on the device."""

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
    """Each tensor as rows of numbers, as a checkpoint stores it. Waits for the device."""
    return {name: value.reshape(_rows(value.shape)).tolist() for name, value in memory.items()}


def with_averages(rows: Mapping[str, T]) -> dict[str, T]:
    """The memory with each moving average in place of the value that it averages."""
    return {**rows, **{name.removeprefix(AVERAGED): value for name, value in rows.items() if name.startswith(AVERAGED)}}


def restored(rows: Rows, fresh: Memory) -> Memory:
    """The memory before the first step, with a checkpoint's values in place of its own where there are any."""
    found = on_device({name: rows[name] for name in fresh if name in rows}, torch.device("cpu"))
    return {name: found[name].view_as(value).to(value.device) if name in found else value
            for name, value in fresh.items()}  # fmt: skip


def wrong_shapes(memory: Mapping[str, Sequence[Sequence[float]]], learner: Learner) -> str:
    """A message if some memory's shape is not the model's; empty if all shapes match."""
    known = learner.known_memory()
    for name, rows in memory.items():
        if name in known and rows and not _is(rows, _rows(known[name])):
            return f"state.memory: {shortened(name)} does not have the model's shape, {list(known[name])}"
    return ""


def wrong_memory(state: TrainState, learner: Learner) -> str:
    """A message if a checkpoint's state does not fit the task and its model; empty if it does."""
    known = learner.known_memory()
    if unknown := [name for name in state.memory if name not in known]:
        return f"state.memory has {shortened(unknown[0])}, which this model and task do not keep"
    if wrong := wrong_shapes(state.memory, learner):
        return wrong
    if state.starved and not _is(state.starved, learner.task.counted):
        return f"state: starved does not have the model's shape, {list(learner.task.counted)}"
    return ""


def _rows(shape: Sequence[int]) -> Shape:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _is(rows: Sequence[Sequence[float]], shape: Sequence[int]) -> bool:
    return len(rows) == shape[0] and all(len(row) == shape[1] for row in rows)

"""The held-out loss around a run's weights: along random directions, or in the plane of its own checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs import ConfigError
from models.init import generator
from trainer.checkpoint.export import load_module
from trainer.checkpoint.manifest import committed

from .held_out import held_out_metrics, held_out_split

Direction = Mapping[str, Tensor]
"""By the parameter's name; parameters that it lacks stay where they are."""
MARGIN = 0.25
"""How far the plane of a trajectory reaches beyond it, in units of its extent."""


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid of one or two axes.

    Attributes:
        run, step: the checkpoint at the origin.
        axes: coordinates along each axis: in units of the weights' own size (`filter_normalised`), or the Euclidean
            distance (`principal_plane`).
        loss: [len(axes[0])], or [len(axes[1]), len(axes[0])]; NaN where it is not finite.
        examples: held-out examples that a loss is the mean of.
        path: (step, x, y) of each checkpoint of a trajectory.
        explained: share of the checkpoints' variance along each axis of a trajectory.
    """

    run: str
    step: int
    axes: list[list[float]]
    loss: list[Any]
    examples: int
    path: list[tuple[int, float, float]]
    explained: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def filter_normalised(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A random direction with each filter as large as the weights' own (arXiv:1712.09913, section 4): a row of a
    matrix, or the weights of an output channel. Biases and norms do not move."""
    found = {}
    for name, weight in module.named_parameters():
        if weight.ndim < 2:
            continue
        # Experts' matrices [experts, rows, columns] have a filter in each row.
        over = (-1,) if weight.ndim == 3 else tuple(range(1, weight.ndim))
        drawn = torch.empty(weight.shape).normal_(generator=generator(f"landscape.{name}", seed))
        sizes = [torch.linalg.vector_norm(each, dim=over, keepdim=True) for each in (weight.detach().cpu(), drawn)]
        found[name] = drawn * (sizes[0] / sizes[1].clamp(min=1e-12))
    return found


def principal_plane(weights: Sequence[Mapping[str, Tensor]]) -> tuple[list[dict[str, Tensor]], np.ndarray, np.ndarray]:
    """The plane through the last of the weights in which the others vary most (arXiv:1712.09913, section 7).

    Args:
        weights: of three or more checkpoints.

    Returns:
        Two orthonormal directions; [n, 2] coordinates of each checkpoint; the share of the variance along each.

    Raises:
        ConfigError: the checkpoints span no plane.
    """
    last = weights[-1]
    moved = [{name: each[name].double() - last[name].double() for name in last} for each in weights[:-1]]
    gram = np.array([[sum(float((a[n] * b[n]).sum()) for n in last) for b in moved] for a in moved])
    values, vectors = np.linalg.eigh(gram)
    if values[-2] <= 1e-12 * max(values[-1], 1e-300):
        raise ConfigError("the run's checkpoints differ along one direction at most, which makes no plane")
    directions, places = [], np.zeros((len(weights), 2))
    for axis, number in enumerate((-1, -2)):
        size = math.sqrt(values[number])
        mixture = vectors[:, number] / size
        directions.append({n: sum(m * each[n] for m, each in zip(mixture, moved, strict=True)) for n in last})
        places[:-1, axis] = vectors[:, number] * size
    return directions, places, values[[-1, -2]] / values.sum()  # type: ignore[return-value]


def landscape(
    run_dir: Path,
    step: int | None = None,
    *,
    ema: bool = False,
    dimensions: int = 2,
    trajectory: bool = False,
    points: int = 15,
    span: float = 1.0,
    examples: int = 128,
    seed: int = 0,
    on_point: Callable[[int, int], None] = lambda done, of: None,
) -> Landscape:
    """The mean held-out loss on a grid around a checkpoint, in one process.

    Args:
        step: of the checkpoint; None: the newest that verifies.
        ema: use the average of the weights.
        dimensions: 1 or 2 random directions.
        trajectory: use the plane of all checkpoints up to `step` instead.
        points: along each axis.
        span: how far it reaches in each direction, in units of the weights' own size.
        examples: the first held-out ones.
        seed: of the directions.
        on_point: is told how many losses of how many are computed.

    Raises:
        ConfigError: as `load_module`; there are no held-out examples; fewer than three checkpoints for a trajectory.
    """
    module, config, found = load_module(run_dir, step, reads=None, ema=ema)
    path: list[tuple[int, float, float]] = []
    explained: list[float] = []
    if trajectory:
        steps = [each for each in committed(run_dir) if each <= found]
        if len(steps) < 3:
            raise ConfigError(
                f"{run_dir} has checkpoints at steps {', '.join(map(str, steps))}, and a trajectory needs three: train "
                "with a larger checkpoint.keep, or set checkpoint.keep_every"
            )
        earlier = [load_module(run_dir, each, reads=None, ema=ema)[0] for each in steps[:-1]]
        everything = [{n: p.detach() for n, p in each.named_parameters()} for each in (*earlier, module)]
        directions, places, shares = principal_plane(everything)
        path = [(number, float(x), float(y)) for number, (x, y) in zip(steps, places, strict=True)]
        explained = shares.tolist()
        reach = [(low - MARGIN * (high - low), high + MARGIN * (high - low))
                 for low, high in zip(places.min(0), places.max(0), strict=True)]  # fmt: skip
    else:
        directions = [filter_normalised(module, seed + number) for number in range(dimensions)]
        reach = [(-span, span)] * dimensions
    axes = [np.linspace(low, high, points) for low, high in reach]
    loss_at, count = _losses(module, config, directions, examples)
    grid = np.full([points] * len(axes), np.nan)
    for done, place in enumerate(np.ndindex(*grid.shape), 1):
        grid[place] = loss_at([axis[i] for axis, i in zip(axes, place[::-1], strict=True)])
        on_point(done, grid.size)
    return Landscape(run_dir.name, found, [axis.tolist() for axis in axes], grid.tolist(), count, path, explained)


@torch.no_grad()
def _losses(
    module: nn.Module, config: Any, directions: Sequence[Direction], examples: int
) -> tuple[Callable[[Sequence[float]], float], int]:
    """A function of coordinates along the directions, and the number of examples that its losses are the mean of."""
    task, nets, dataset, here, size = held_out_split(module, config)
    count = min(examples, len(dataset))
    origin = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    ways = [{name: each.to(here, torch.float32) for name, each in direction.items()} for direction in directions]

    @torch.no_grad()
    def loss_at(place: Sequence[float]) -> float:
        for name, parameter in module.named_parameters():
            parameter.copy_(origin[name])
            for distance, way in zip(place, ways, strict=True):
                if name in way:
                    parameter.add_(way[name], alpha=float(distance))
        loss, *_ = held_out_metrics(task, nets, dataset, count, min(size, count), here)
        return loss if math.isfinite(loss) else math.nan

    return loss_at, count

"""The gradient of the held-out loss, by weight: where it vanishes or explodes in a deep network."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs import ConfigError
from trainer.checkpoint.export import load_module

from .held_out import held_out_split


@dataclass(frozen=True)
class WeightGradient:
    """Of one weight, from the input to the output.

    Attributes:
        grad_norm: Euclidean norm of the gradient of the mean held-out loss; NaN or infinite where it is not finite.
        norm: of the weight.
    """

    name: str
    shape: tuple[int, ...]
    grad_norm: float
    norm: float


@dataclass(frozen=True)
class Gradients:
    run: str
    step: int
    examples: int
    weights: list[WeightGradient]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gradients(run_dir: Path, step: int | None = None, *, ema: bool = False, examples: int = 128) -> Gradients:
    """The gradient of the mean held-out loss by weight, at a checkpoint, in one process.

    Matrices and convolutions only: biases and norms are small beside them. Weights that the loss does not depend on are
    left out.

    Args:
        step: of the checkpoint; None: the newest that verifies.
        ema: use the average of the weights.
        examples: the first held-out ones.

    Raises:
        ConfigError: as `load_module`; there are no held-out examples.
    """
    module, config, found = load_module(run_dir, step, reads=None, ema=ema)
    task, nets, dataset, here, micro_batch = held_out_split(module, config)
    count = min(examples, len(dataset))
    module.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64, device=here)
    for start in range(0, count, micro_batch):
        batch = dataset.examples(list(range(start, min(start + micro_batch, count)))).to(here)
        sums = task.evaluate(nets, batch)
        if not sums.loss.requires_grad:
            raise ConfigError(f"{run_dir}: the held-out score of task={config.task} has no gradient")
        sums.loss.backward()
        total += sums.weight
    weights = []
    for name, weight in module.named_parameters():
        if weight.ndim >= 2 and weight.grad is not None:
            grad_norm = torch.linalg.vector_norm(weight.grad.double()) / total
            weights.append(
                WeightGradient(name, tuple(weight.shape), grad_norm.item(), torch.linalg.vector_norm(weight).item())
            )
    return Gradients(run_dir.name, found, count, weights)

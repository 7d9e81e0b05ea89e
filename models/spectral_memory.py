"""Spectral norm whose vectors are the same in every topology: one power iteration per step, not one per pass.

`torch.nn.utils.parametrizations.spectral_norm` divides a weight by its largest singular value, which it estimates by
two vectors and improves by a power iteration in each training pass: how often depends on the number of micro-batches.
Here only the first training pass of a step does (arXiv:1802.05957, algorithm 1, has one per update). The vectors are
then a function of the weights and of the vectors before, whatever the topology.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from .init import generator
from .norm_memory import Shapes, by_full_name

VECTORS = ("_u", "_v")
FIRST_ITERATIONS = 15
"""Over the weights that a run begins with, as many as torch makes."""


def _spectral_norms(module: nn.Module) -> Iterator[tuple[str, _SpectralNorm]]:
    """(name, layer) of every spectral norm of a matrix; a vector's is exact and remembers nothing."""
    for name, part in module.named_modules():
        if isinstance(part, _SpectralNorm) and hasattr(part, "_u"):
            yield name, part


@torch.no_grad()
def fill_vectors(module: nn.Module, seed: int) -> None:
    """Make the vectors of a module on a real device anew, as a function of (seed, name, weights) only."""
    for name, norm in _spectral_norms(module):
        for vector in VECTORS:
            held = getattr(norm, vector)
            held.copy_(F.normalize(torch.randn(held.shape, generator=generator(f"{name}.{vector}", seed)), dim=0))
    for part in list(module.modules()):
        if isinstance(part, ParametrizationList) and (norms := [norm for _, norm in _spectral_norms(part)]):
            kept = [(norm, norm.n_power_iterations, norm.training) for norm in norms]
            for norm in norms:
                norm.n_power_iterations, norm.training = FIRST_ITERATIONS, True
            part()
            for norm, iterations, training in kept:
                norm.n_power_iterations, norm.training = iterations, training


class SpectralTap:
    """Lets every spectral norm iterate once per step, in fp32.

    Args:
        modules: of the model, by the name prefix of their parts.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._norms = by_full_name(modules, _spectral_norms)
        self._iterations = {name: norm.n_power_iterations for name, norm in self._norms.items()}
        for norm in self._norms.values():
            for vector in VECTORS:
                norm.register_buffer(vector, getattr(norm, vector).float())
            norm.forward = _once(norm)  # type: ignore[assignment, method-assign]

    def fresh(self) -> dict[str, list]:
        """Memory before the first step: the vectors as they are."""
        return {key: vector.tolist() for key, vector in self._vectors()}

    def known(self) -> Shapes:
        return {key: tuple(vector.shape) for key, vector in self._vectors()}

    def after_step(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Memory after a step, in whose first pass the vectors moved."""
        return memory | {key: vector.double() for key, vector in self._vectors()}

    def tell(self, memory: Mapping[str, Tensor]) -> None:
        """Put the vectors into the layers; the next training pass moves them."""
        for key, vector in self._vectors():
            vector.copy_(memory[key])
        for name, norm in self._norms.items():
            norm.n_power_iterations = self._iterations[name]

    def _vectors(self) -> Iterator[tuple[str, Tensor]]:
        for name, norm in self._norms.items():
            for vector in VECTORS:
                yield f"{name}.{vector}", getattr(norm, vector)


def _once(norm: _SpectralNorm) -> Callable[[Tensor], Tensor]:
    plain = norm.forward

    def forward(weight: Tensor) -> Tensor:
        found = plain(weight.float()).to(weight.dtype)
        if norm.training:
            norm.n_power_iterations = 0
        return found

    return forward

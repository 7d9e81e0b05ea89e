"""Sparse upcycling: a MoE block's parameters made from the dense SwiGLU that stands in its place elsewhere.

Shapes: E experts, I width of an expert, H hidden size, D = g * I width of the dense SwiGLU.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from configs import ConfigError, ModelConfig
from configs.sections.train import UpcycleConfig
from models.init import generator, initial_value


def block_of(name: str) -> str | None:
    """`model.layers.3.mlp` of `model.layers.3.mlp.experts.down_proj`; None for a parameter outside MoE blocks."""
    found = re.match(r"(.+\.mlp)\.(?:experts|gate|shared_expert|shared_expert_gate)\.", name)
    return found[1] if found else None


def granularity(dense_size: int, config: ModelConfig) -> int:
    """g: the number of slices that a SwiGLU of that width is cut into, one per expert of a group of g.

    Raises:
        ConfigError: `model.expert_size` does not give equal slices, or experts cannot be chosen in whole groups of g.
    """
    size, experts = config.expert_size, config.num_experts // config.expert_groups
    assert size, "resolve() fills model.expert_size"
    if dense_size % size:
        raise ConfigError(
            f"train.upcycle copies an MLP of width {dense_size}, or equal slices of it, into each expert, but "
            f"model.expert_size is {size}: set it to {dense_size}, or to {dense_size} divided by a whole number"
        )
    slices = dense_size // size
    if experts % slices or config.top_k % slices:
        raise ConfigError(
            f"train.upcycle: model.expert_size={size} cuts an MLP of width {dense_size} into {slices} slices, one "
            f"per expert: make model.top_k ({config.top_k}) and model.num_experts / model.expert_groups ({experts}) "
            f"multiples of {slices}, or set model.expert_size={dense_size}"
        )
    return slices


@torch.no_grad()
def upcycle(
    parameter: nn.Parameter,
    name: str,
    dense: Callable[[str], Tensor],
    dense_size: int,
    config: ModelConfig,
    how: UpcycleConfig,
    seed: int,
) -> None:
    """Fill one parameter of a MoE block so that, where its weights are normalised, it begins as the dense SwiGLU.

    Every expert is a copy (Komatsuzaki et al., arXiv:2212.05055). Narrower experts are slices 0, 1, .., g - 1, 0, 1, ..
    of it, and every g in a row begin with one row of the router, so that they are chosen together (virtual groups, He
    et al., arXiv:2410.07524); as each then has 1 / g of a copy's weight, `down_proj` is g times the dense one. It is
    divided by `model.router_scale` too. The router begins at random, and so does a shared expert, but its `down_proj`
    is zero: it adds nothing yet. All draws are functions of (seed, name, expert) only.

    Args:
        parameter: on any device.
        name: of which `block_of` is not None.
        dense: reads a parameter of the dense model.
        dense_size: D.
        config: of the MoE model, resolved.
    """
    block, slices = block_of(name), granularity(dense_size, config)
    assert block is not None
    match name.removeprefix(f"{block}."):
        case "experts.gate_up_proj":
            for kind, experts_EIH in zip(("gate_proj", "up_proj"), parameter.chunk(2, dim=1), strict=True):
                _fill(experts_EIH, dense(f"{block}.{kind}.weight"), f"{block}.{kind}", how, seed)
        case "experts.down_proj":
            # Transposed, as hidden units are rows of the other two.
            down_DH = dense(f"{block}.down_proj.weight").float().t() * (slices / config.router_scale)
            _fill(parameter.transpose(1, 2), down_DH, f"{block}.down_proj", how, seed)
        case "gate.weight":
            groups = torch.Size((config.num_experts // slices, config.hidden_size))
            parameter.copy_(initial_value(name, groups, config.init_std, seed).repeat_interleave(slices, 0))
        case "shared_expert.down_proj.weight":
            parameter.zero_()
        case _:
            parameter.copy_(initial_value(name, parameter.shape, config.init_std, seed))


def _fill(experts_EIH: Tensor, dense_DH: Tensor, name: str, how: UpcycleConfig, seed: int) -> None:
    """Give each expert its slice of a dense matrix, with noise, and with some hidden units drawn anew.

    Which units is the same for the three matrices of an expert; they are drawn from a normal distribution with the
    mean and the standard deviation of what stood there (Drop-Upcycling, Nakamura et al., arXiv:2502.19261, section 3).
    """
    dense_DH = dense_DH.float()
    block, size = name.rpartition(".")[0], experts_EIH.shape[1]
    noise = how.noise * dense_DH.std().item() if how.noise else 0.0
    dropped = round(how.drop_ratio * size)
    slices = dense_DH.split(size)
    for expert, target_IH in enumerate(experts_EIH):
        copy_IH = slices[expert % len(slices)].clone()
        if noise:
            copy_IH += initial_value(f"{name}.{expert}.noise", copy_IH.shape, noise, seed)
        if dropped:
            units = torch.randperm(size, generator=generator(f"{block}.{expert}.dropped", seed))[:dropped]
            old = copy_IH[units]
            copy_IH[units] = old.mean() + initial_value(f"{name}.{expert}.drawn", old.shape, old.std().item(), seed)
        target_IH.copy_(copy_IH)

"""Which stretch of which parameter's fp32 weights and optimizer states this process holds, at any topology."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.fragments import Box, whole

from .parallel import box_of, plain_name


@dataclass(frozen=True)
class Piece:
    """What this process holds of one parameter: at ZeRO-3 still to be shared out, else as it is used."""

    name: str
    """The plain model's own name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter in the plain model."""
    box: Box
    """The slice of it that is this process's parameter: all of it, without tensor and expert parallelism."""
    parameter: nn.Parameter
    writes: bool
    """Whether a checkpoint takes it from this process; other tensor-parallel ranks hold the same."""


def pieces(engine: Any) -> Iterator[Piece]:
    """Every trainable parameter of this process, in the module's order."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            plain, part = plain_name(name)
            shape = engine.plain_shapes[plain]
            local = tuple(getattr(parameter, "ds_shape", parameter.shape))
            box = box_of(shape, local, part, engine.tp_rank, engine.ep_rank)
            yield Piece(plain, shape, box, parameter, writes=engine.tp_rank == 0 or box != whole(shape))


@dataclass(frozen=True)
class Slot(Piece):
    """The stretch of one parameter whose fp32 master weights and optimizer states this process holds."""

    start: int
    """First element, in the flattened slice, of the stretch."""
    numel: int
    owner: Tensor
    """Tensor that the optimizer keys its state by."""
    offset: int
    """First element of the stretch in `owner`, flattened."""

    def view(self, tensor: Tensor) -> Tensor:
        """The stretch of `tensor`, which has `owner`'s size, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def slots(engine: Any) -> Iterator[Slot]:
    """Every stretch held by this process, in the module's order, at any ZeRO stage."""
    optimizer = engine.optimizer
    for piece in pieces(engine):
        parameter: Any = piece.parameter
        slot = partial(Slot, **vars(piece))
        if is_sharded(engine):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            size = parameter.ds_tensor.ds_numel
            start = torch.distributed.get_rank(parameter.ds_process_group) * size
            numel = min(size, parameter.ds_numel - start)  # the last piece is padded
            if numel > 0:
                owner = optimizer.fp32_partitioned_groups_flat[group]
                yield slot(start=start, numel=numel, owner=owner, offset=offset)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = getattr(optimizer, "fp32_groups_flat_partition", None)
                if flat is None:
                    flat = optimizer.single_partition_of_fp32_groups
                held, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                owner = flat[mapping.param_group_index]
                yield slot(start=held.start, numel=held.numel, owner=owner, offset=here.start)
        else:
            yield slot(start=0, numel=parameter.numel(), owner=parameter, offset=0)


def is_sharded(engine: Any) -> bool:
    """Whether a process holds only its own part of each working weight (ZeRO-3)."""
    return engine.zero_optimization_stage() == 3


def is_replicated(engine: Any) -> bool:
    """Whether every process holds every state whole (ZeRO-0)."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def norm_of_whole_gradient(engine: Any) -> Tensor:
    """Global gradient norm at ZeRO 1 and 2, every element of the plain model counted once.

    DeepSpeed 0.19 adds up its own by tensor-parallel rank, and so counts only some of the experts when expert and
    tensor parallelism meet; what a checkpoint takes from each process is each element once.
    """
    optimizer = engine.optimizer
    counted = {id(piece.parameter) for piece in pieces(engine) if piece.writes}
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for group, parameters in enumerate(optimizer.params_in_partition):
        gradients = [g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        for gradient, parameter in zip(gradients, parameters, strict=True):
            if id(parameter) in counted:
                total += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
    torch.distributed.all_reduce(total)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)  # DeepSpeed's sign for a norm that is not finite

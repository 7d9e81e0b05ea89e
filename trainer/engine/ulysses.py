"""Ulysses sequence parallelism: a process holds a part of every sequence; in attention, some heads of whole sequences.

Jacobs et al., arXiv:2309.14509. DeepSpeed's `DistributedAttention` does the exchange. DeepSpeed itself is not told of
the sequence-parallel groups, so it sees dp * sp data-parallel processes and averages gradients over all of them. If it
were told, it would divide by dp at ZeRO 0 to 2 and by dp * sp at ZeRO-3 (`reduce_scatter_coalesced` ignores sequence
parallelism), and with a device mesh it would not sum over the parts of a sequence at all.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from configs import Config, ConfigError
from models.batch import Batch
from models.decoder.attention import Attention, Visibility

from .private import DistributedAttention


def sequence_group(config: Config) -> dist.ProcessGroup:
    """This process's group of neighbouring ranks that split sequences among them. Every process must call it."""
    group, _ = dist.new_subgroups(config.parallel.sp, timeout=timedelta(seconds=config.cluster.timeout))
    return group


def share_sequences(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Make the attention layers of a module see whole sequences where the module is given parts of them.

    Raises:
        ConfigError: the module has no `Attention` layers: it is of a plugin's family.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Attention)]
    if not layers:
        raise ConfigError(
            f"parallel.sp={group.size()} needs a model.family whose attention is models.decoder.attention.Attention: "
            "set parallel.sp=1"
        )
    # Compiled, DeepSpeed's autograd function would give a gradient of zero.
    exchange = torch.compiler.disable(_exchange)
    for layer in layers:
        layer.attend = partial(exchange, group, layer.attend)


def split(batch: Batch, part: int, parts: int) -> Batch:
    """One of `parts` equal parts of every sequence; positions and document ids remain those of the whole sequence."""
    if parts == 1:
        return batch
    length = batch.input_ids.shape[1] // parts

    def cut(whole_BT: Tensor) -> Tensor:
        return whole_BT[:, part * length : (part + 1) * length].contiguous()

    return replace(
        batch,
        input_ids=cut(batch.input_ids),
        labels=cut(batch.labels),
        position_ids=cut(batch.position_ids),
        part=(part, parts),
    )


def mean_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """A differentiable mean over the processes of a group, each of which must compute the same loss from it."""
    return partial(_Mean.apply, group)


class _Mean(torch.autograd.Function):
    """x contributes 1/n of itself to the mean, and n processes compute the same loss from it: the factors cancel."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor) -> Tensor:
        mean = x / group.size()
        dist.all_reduce(mean, group=group)
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return None, gradient


def _exchange(
    group: dist.ProcessGroup,
    attend: Callable[[Tensor, Tensor, Tensor, Visibility], Tensor],
    q_BTND: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    visible: Visibility,
) -> Tensor:
    """`attend` over whole sequences for a share of the heads; T is a part of a sequence in inputs and output."""
    kv_heads, parts = k_BTKD.shape[2], group.size()
    if kv_heads < parts:  # several processes need the same head
        k_BTKD, v_BTKD = (x.repeat_interleave(parts // kv_heads, dim=2) for x in (k_BTKD, v_BTKD))
    exchange = DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)
    return exchange(q_BTND, k_BTKD, v_BTKD, 0, None, visible)

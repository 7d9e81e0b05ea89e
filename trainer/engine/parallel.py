"""Parallelism from outside: how DeepSpeed is told to split the plain model, and which part of it each process holds.

Order: the plain model is built and initialised; its shapes are recorded; DeepSpeed replaces MoE blocks (AutoEP), then
splits linear layers (AutoTP), then shards states (ZeRO). Names and shapes in checkpoints stay those of the plain model.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from configs import Config
from models.moe.router import Chooser, Router
from models.planning.memory import REDUCE_BUCKET
from trainer.checkpoint.fragments import Box


@dataclass(frozen=True)
class Place:
    """A process's coordinates in the topology."""

    dp: int
    tp: int
    pp: int
    sp: int


def place(config: Config, rank: int) -> Place:
    """rank = ((pp * dp_degree + dp) * inner + tp or sp), as DeepSpeed numbers them; tp and sp are never combined."""
    parallel = config.parallel
    outer, inner = divmod(rank, parallel.tp * parallel.sp)
    pp, dp = divmod(outer, parallel.dp)
    return Place(dp, inner if parallel.tp > 1 else 0, pp, inner if parallel.sp > 1 else 0)


def expert_group_name(config: Config) -> str:
    """DeepSpeed's name for the expert-parallel process group."""
    return f"ep_size_{config.parallel.ep}"


def engine_sections(config: Config) -> dict[str, Any]:
    """The sections of DeepSpeed's config for expert and tensor parallelism."""
    sections: dict[str, Any] = {}
    model, parallel = config.model, config.parallel
    if parallel.ep > 1:
        sections["expert_parallel"] = {
            "enabled": True,
            "autoep_size": parallel.ep,
            "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
            "router_pattern": "gate",
            "expert_pattern": "experts",
            "expert_w1": "gate_up_proj",
            "expert_w2": "down_proj",
            "expert_w3": None,
            "top_k": model.top_k,
            # For AutoEP's own router, which `keep_routers` replaces.
            "score_func": "softmax",
            "route_norm": False,
        }
        if model.shared_expert_size:
            sections["expert_parallel"] |= {"has_shared_experts": True, "shared_experts_pattern": "shared_expert"}
        if model.shared_expert_gate:
            sections["expert_parallel"]["shared_experts_gate_pattern"] = "shared_expert_gate"
    if parallel.tp > 1:
        # Each rank normalises its own heads, so the gradients of the QK-norm weights must be summed over the ranks.
        specs = [
            {"patterns": [r".*\.[qk]_norm\.weight$"], "partition_type": "skip", "grad_allreduce": True},
            {"patterns": [r".*\.([qkv]|gate|up)_proj\.weight$"], "partition_type": "column"},
            {"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"},
            {"patterns": [r".*"], "partition_type": "skip"},
        ]
        sections["tensor_parallel"] = {
            "autotp_size": parallel.tp,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        }
    return sections


def zero_section(config: Config) -> dict[str, Any]:
    """DeepSpeed's ZeRO settings other than the stage."""
    parallel = config.parallel
    # ZeRO 1 and 2 allocate buffers of this size at every step; the default is 5e8 elements, however small the model.
    section: dict[str, Any] = {"reduce_bucket_size": REDUCE_BUCKET}
    if parallel.hpz > 1:
        section["zero_hpz_partition_size"] = parallel.hpz
    if parallel.offload != "none":
        section["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload == "parameters":
        section["offload_param"] = {"device": "cpu"}
    return section


def keep_routers(module: nn.Module) -> None:
    """Make the MoE blocks that AutoEP put in place of ours use our own choosers, in fp32, instead of its router."""
    for layer in module.modules():
        router: Any = next((each.router for each in layer.children() if hasattr(each, "router")), None)
        if isinstance(chooser := getattr(layer, "chooser", None), Chooser) and router is not None:
            router.gate.__class__ = Router
            router.forward = functools.partial(_as_autoep_asks, chooser, router.gate)


def _as_autoep_asks(
    chooser: Chooser, gate: nn.Module, x_SH: Tensor, expert_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What AutoEP's TokenChoiceTopKRouter returns: weights [S, k], choices [S, k], tokens per expert [E] int32.

    Dropped assignments are dispatched like the others, with weight 0.
    """
    routing = chooser(gate, x_SH)
    counts_E = torch.zeros(chooser.config.num_experts, dtype=torch.int32, device=x_SH.device)
    ones_A = torch.ones(routing.choice.numel(), dtype=torch.int32, device=x_SH.device)
    return routing.weight, routing.choice, counts_E.scatter_add_(0, routing.choice.flatten(), ones_A)


_EXPERT_WEIGHT = re.compile(r"(.*\.experts)\.(w[123])$")
_RENAMED = (
    (".router.gate.", ".gate."),
    (".shared_experts.", ".shared_expert."),
    (".shared_experts_gate.", ".shared_expert_gate."),
)


def plain_name(name: str) -> tuple[str, str]:
    """The plain model's name for a parameter, and which of an expert's three matrices it is (empty if none)."""
    if found := _EXPERT_WEIGHT.match(name):
        return f"{found[1]}.{'down_proj' if found[2] == 'w2' else 'gate_up_proj'}", found[2]
    for replaced, plain in _RENAMED:
        name = name.replace(replaced, plain)
    return name, ""


def box_of(shape: tuple[int, ...], local: tuple[int, ...], part: str, tp: int, ep: int) -> Box:
    """Which slice of a whole parameter a process holds.

    Args:
        shape: shape of the whole parameter.
        local: shape of the process's own part.
        part: as returned by `plain_name`.
        tp, ep: the process's ranks in its tensor- and expert-parallel groups.
    """
    if part:
        first, half = ep * local[0], shape[1] // 2
        rows = {"w1": (0, half), "w3": (half, 2 * half), "w2": (0, shape[1])}[part]
        return ((first, first + local[0]), rows, (0, shape[2]))
    return tuple(
        (0, whole) if whole == mine else (tp * mine, (tp + 1) * mine) for whole, mine in zip(shape, local, strict=True)
    )


def everyones(own: Tensor) -> tuple[Tensor, int]:
    """See `models.tasks.task.Task.everyones`; [B, ...] of the same shape in every process."""
    return _Gathered.apply(own), dist.get_rank() * len(own)  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    """Each process's loss depends on all parts: the gradient of a part is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.size = len(own)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous()
        dist.all_reduce(whole)
        return whole[dist.get_rank() * ctx.size :][: ctx.size]

"""Parallelism from outside: what DeepSpeed is told about the plain model, and what each process holds of it.

Order: the plain model is built and filled; its shapes are noted; DeepSpeed replaces MoE blocks (AutoEP), then splits
linear layers (AutoTP), then shares out states (ZeRO). Names and shapes in checkpoints stay those of the plain model.
"""

import re
from dataclasses import dataclass
from typing import Any

from configs import Config

from .fragments import Box


@dataclass(frozen=True)
class Place:
    """Where a process stands in the topology."""

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
    """DeepSpeed's name for the process group of expert parallelism."""
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
            "score_func": "softmax",
            "route_norm": model.norm_topk_prob,
        }
        if model.shared_expert_size:
            sections["expert_parallel"] |= {"has_shared_experts": True, "shared_experts_pattern": "shared_expert"}
    if parallel.tp > 1:
        # Each rank normalises its own heads, so the gradients of the heads' norms must be added up over the ranks.
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
    """What DeepSpeed's ZeRO is told beyond its stage."""
    parallel = config.parallel
    # Elements of the buffers in which gradients are averaged. ZeRO 1 and 2 make them anew at every step, by default of
    # 5e8 elements, however small the model.
    section: dict[str, Any] = {"reduce_bucket_size": 50_000_000}
    if parallel.hpz > 1:
        section["zero_hpz_partition_size"] = parallel.hpz
    if parallel.offload != "none":
        section["offload_optimizer"] = {"device": "cpu"}
    if parallel.offload == "parameters":
        section["offload_param"] = {"device": "cpu"}
    return section


_EXPERT_WEIGHT = re.compile(r"(.*\.experts)\.(w[123])$")
_RENAMED = ((".router.gate.", ".gate."), (".shared_experts.", ".shared_expert."))


def plain_name(name: str) -> tuple[str, str]:
    """The plain model's name of a parameter, and which of an expert's three matrices it is (else empty)."""
    if found := _EXPERT_WEIGHT.match(name):
        return f"{found[1]}.{'down_proj' if found[2] == 'w2' else 'gate_up_proj'}", found[2]
    for replaced, plain in _RENAMED:
        name = name.replace(replaced, plain)
    return name, ""


def box_of(shape: tuple[int, ...], local: tuple[int, ...], part: str, tp: int, ep: int) -> Box:
    """Which slice of a whole parameter a process holds.

    Args:
        shape: of the whole parameter.
        local: of the process's own.
        part: as from `plain_name`.
        tp, ep: the process's ranks in its tensor- and expert-parallel groups.
    """
    if part:
        first, half = ep * local[0], shape[1] // 2
        rows = {"w1": (0, half), "w3": (half, 2 * half), "w2": (0, shape[1])}[part]
        return ((first, first + local[0]), rows, (0, shape[2]))
    return tuple(
        (0, whole) if whole == mine else (tp * mine, (tp + 1) * mine) for whole, mine in zip(shape, local, strict=True)
    )

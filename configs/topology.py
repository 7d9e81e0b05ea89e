"""What cannot be combined: one table of rules, each with its reason, checked before any process starts.

A rule is here because DeepSpeed 0.19 enforces it (its file is named) or because the combination could not be shown to
equal one process.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from .base import ConfigError
from .sections.model import ModelConfig
from .sections.parallel import MOST_STAGES, ParallelConfig
from .sections.run import Config
from .stages import layers_of_ranks


class Rule(NamedTuple):
    """One forbidden combination."""

    broken: Callable[[Config], bool]
    why: str
    """Completes the sentence "parallel.tp=3: ...". `{p}`, `{m}` and `{t}` are the sections parallel, model and train.
    """
    source: str
    """Where DeepSpeed checks it, or what was observed."""


def _divides(parts: int, *wholes: int | None) -> bool:
    return all(whole is None or whole % parts == 0 for whole in wholes)


def _rank_without_experts(config: Config) -> bool:
    model, parallel = config.model, config.parallel
    if parallel.pp == 1 or parallel.stages > model.num_layers:
        return False
    return not all(any(map(model.is_moe_layer, layers)) for layers in layers_of_ranks(model.num_layers, parallel))


def _micro_batches(config: Config) -> int:
    """Micro-batches of one data-parallel rank in one step."""
    assert config.train.micro_batch
    return math.ceil(math.ceil(config.train.global_batch / config.train.micro_batch) / config.parallel.dp)


def _has_dense_layer(config: Config) -> bool:
    return config.model.num_moe_layers < config.model.num_layers


CUTS = ("tp", "pp", "ep", "sp")
RULES: dict[str, Rule] = {
    "tp heads": Rule(
        lambda c: not _divides(c.parallel.tp, c.model.num_heads, c.model.num_kv_heads),
        "tp splits attention by heads, so it must divide model.num_heads ({m.num_heads}) and model.num_kv_heads "
        "({m.num_kv_heads})",
        "module_inject/tp_shard.py assigns whole heads; runtime/engine.py refuses tp above the key-value heads",
    ),
    "tp width": Rule(
        lambda c: (
            (_has_dense_layer(c) and not _divides(c.parallel.tp, c.model.intermediate_size))
            or not _divides(c.parallel.tp, c.model.shared_expert_size)
        ),
        "tp splits these widths, so it must divide model.intermediate_size ({m.intermediate_size}) and "
        "model.shared_expert_size ({m.shared_expert_size})",
        "module_inject/layers.py splits a weight into equal parts",
    ),
    "ep without experts": Rule(
        lambda c: c.parallel.ep > 1 and not c.model.is_moe,
        "expert parallelism needs experts, but model.num_experts is 0",
        "module_inject/auto_ep.py finds no MoE layer",
    ),
    "ep experts": Rule(
        lambda c: c.model.is_moe and not _divides(c.parallel.ep, c.model.num_experts),
        "ep must divide model.num_experts ({m.num_experts})",
        "module_inject/auto_ep_config.py: validate_autoep_post_detection",
    ),
    "ep ranks": Rule(
        lambda c: not _divides(c.parallel.ep, c.parallel.dp * c.parallel.tp * c.parallel.sp),
        "expert parallelism uses the ranks of dp, tp and sp, so ep must divide dp * tp * sp",
        "module_inject/auto_ep_folding.py: build_folding_spec",
    ),
    "ep and hash": Rule(
        lambda c: c.parallel.ep > 1 and c.model.router == "hash",
        "AutoEP needs a learned router gate, which model.router=hash does not have",
        "module_inject/auto_ep_layer.py: AutoEPMoELayer copies the weights of the gate",
    ),
    "ep and padding": Rule(
        lambda c: c.parallel.ep > 1 and c.model.pad_to_capacity,
        "AutoEP sends each expert only the tokens that chose it, so model.pad_to_capacity must be false",
        "module_inject/auto_ep_layer.py: compute_split_plan",
    ),
    "sp and capacity": Rule(
        lambda c: c.parallel.sp > 1 and c.model.capacity_factor is not None,
        "an expert's capacity is counted over whole sequences in token order, so model.capacity_factor must be null",
        "models/moe/router.py: within_capacity counts along a micro-batch, of which a rank holds only a part",
    ),
    "tp and sp": Rule(
        lambda c: c.parallel.tp > 1 and c.parallel.sp > 1,
        "both split the attention heads over the same ranks",
        "utils/groups.py: one mesh of (data, tensor) or (data, sequence); auto_ep_folding.py: mutually exclusive",
    ),
    "pp and zero": Rule(
        lambda c: c.parallel.pp > 1 and c.parallel.zero_stage > 1,
        "a pipeline needs whole gradients and weights between micro-batches, which ZeRO-2 and ZeRO-3 partition",
        "runtime/pipe/engine.py: ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism",
    ),
    "pp and tp": Rule(
        lambda c: c.parallel.pp > 1 and c.parallel.tp > 1,
        "AutoTP numbers its ranks without regard to the pipeline stages",
        "runtime/engine.py: _configure_tensor_parallel_states replaces the grid that PipelineEngine reads",
    ),
    "pp and sp": Rule(
        lambda c: c.parallel.pp > 1 and c.parallel.sp > 1,
        "the sequence-parallel groups are built without regard to the pipeline stages",
        "runtime/pipe/topology.py has no sequence axis",
    ),
    "pp layers": Rule(
        lambda c: c.parallel.stages > c.model.num_layers,
        "each of the {p.stages} stages needs a layer, but model.num_layers is {m.num_layers}",
        "runtime/pipe/module.py: a stage without layers has no parameters to train",
    ),
    "pp and tied embeddings": Rule(
        lambda c: c.parallel.pp > 1 and c.model.tie_embeddings,
        "the embedding and the head are on different stages, so model.tie_embeddings must be false",
        "runtime/pipe/module.py: TiedLayerSpec keeps two copies, and a checkpoint would contain the weight twice",
    ),
    "pp and ep": Rule(
        lambda c: c.parallel.ep > 1 and _rank_without_experts(c),
        "expert parallelism needs an MoE layer on every pipeline rank",
        "module_inject/auto_ep.py: _raise_no_moe_layers_detected",
    ),
    "pp and fp16": Rule(
        lambda c: c.parallel.pp > 1 and c.train.precision == "fp16",
        "the loss scale does not reach the router losses of earlier stages, so train.precision must be bf16 or fp32",
        "runtime/pipe/engine.py runs the backward pass of earlier stages from the gradient of the hidden states alone",
    ),
    "fp8 and split models": Rule(
        lambda c: c.train.precision == "fp8" and max(c.parallel.tp, c.parallel.pp, c.parallel.sp) > 1,
        "train.precision=fp8 works with dp, ep and ZeRO only",
        "module_inject/auto_tp.py replaces linear layers by its own, which do not support fp8",
    ),
    "dualpipev alone": Rule(
        lambda c: c.parallel.pp_schedule == "dualpipev" and c.parallel.pp == 1,
        "dualpipev is a pipeline schedule, but pp is 1",
        "runtime/pipe/p2p.py: init_process_groups asserts more than one rank",
    ),
    "dualpipev and batch": Rule(
        lambda c: c.parallel.pp_schedule == "dualpipev" and _micro_batches(c) < c.parallel.stages,
        "dualpipev needs at least 2 * pp ({p.stages}) micro-batches on each data-parallel rank, more than "
        "train.global_batch ({t.global_batch}) gives with train.micro_batch ({t.micro_batch})",
        "runtime/pipe/dualpipev.py: DualPipeVEngine asserts it, schedule.py: DualPipeVSchedule raises",
    ),
    "sp heads": Rule(
        lambda c: (
            not _divides(c.parallel.sp, c.model.num_heads)
            or not (_divides(c.parallel.sp, c.model.num_kv_heads) or _divides(c.model.num_kv_heads or 1, c.parallel.sp))
        ),
        "Ulysses exchanges parts of the sequence for heads, so sp must divide model.num_heads ({m.num_heads}), "
        "and must divide or be a multiple of model.num_kv_heads ({m.num_kv_heads})",
        "runtime/sequence_parallel/ulysses_sp.py: the same two checks",
    ),
    "sp length": Rule(
        lambda c: not _divides(c.parallel.sp, c.train.seq_len),
        "sp must divide train.seq_len ({t.seq_len})",
        "sequence/layer.py: every rank holds an equal part of the sequence",
    ),
    "hpz": Rule(
        lambda c: c.parallel.hpz > 1 and (c.parallel.zero_stage != 3 or not _divides(c.parallel.hpz, c.parallel.dp)),
        "hierarchical sharding (hpZ) needs ZeRO-3, and hpz must divide dp",
        "runtime/zero/partition_parameters.py: zero_hpz_partition_size",
    ),
    "hpz alone": Rule(
        lambda c: c.parallel.hpz > 1 and max(c.parallel.tp, c.parallel.pp, c.parallel.ep, c.parallel.sp) > 1,
        "hierarchical sharding (hpZ) works with plain data parallelism only",
        "runtime/engine.py: AutoEP with ZeRO-3 does not support hpZeRO; the others were not shown to be equal",
    ),
    "offload and zero": Rule(
        lambda c: (
            (c.parallel.offload == "optimizer" and c.parallel.zero_stage == 0)
            or (c.parallel.offload == "parameters" and c.parallel.zero_stage != 3)
        ),
        "offload=optimizer needs zero_stage 1 to 3, offload=parameters needs zero_stage 3",
        "runtime/zero/config.py: offload_optimizer is valid with stages 1 to 3, offload_param with 3",
    ),
    "sam": Rule(
        lambda c: c.optim.sam > 0 and (c.parallel.zero_stage == 3 or max(getattr(c.parallel, k) for k in CUTS) > 1),
        "optim.sam moves whole weights up the slope, which ZeRO-3, tp, pp, ep and sp split",
        "trainer/engine/optim.py: Sam takes a gradient that DeepSpeed does not see",
    ),
    "offload alone": Rule(
        lambda c: (
            c.parallel.offload != "none"
            and max(c.parallel.tp, c.parallel.pp, c.parallel.ep, c.parallel.sp, c.parallel.hpz) > 1
        ),
        "offload works with plain data parallelism only",
        "module_inject/auto_ep_folding.py refuses it with tp and ep; the others were not shown to be equal",
    ),
}


OF_ANY_MODEL = ("dualpipev alone", "hpz", "hpz alone", "sam", "offload and zero", "offload alone")
"""Rules that need no decoder config, for models that cannot be split."""


def refusals(config: Config) -> list[str]:
    """Why a resolved config's topology cannot run: one line per broken rule; empty if it can."""
    model = config.model
    if not isinstance(model, ModelConfig):
        cut = [key for key in CUTS if getattr(config.parallel, key) > 1 and key not in model.cuts]
        rules = [RULES[name] for name in OF_ANY_MODEL]
        refused = [f"model.family={model.family} cannot be split by {' or '.join(cut)}: it supports dp and ZeRO only"]
        refused = refused if cut else []
        if config.parallel.zero_stage > model.most_zero:
            refused.append(f"model.family={model.family} as configured trains with ZeRO 0 to {model.most_zero}")
        return refused + [rule.why for rule in rules if rule.broken(config)]
    sections = {"p": config.parallel, "m": config.model, "t": config.train}
    return [rule.why.format(**sections) for rule in RULES.values() if rule.broken(config)]


def check_topology(config: Config) -> None:
    """Raise a ConfigError that says what cannot be combined, why, and the nearest topology that can."""
    if not (reasons := refusals(config)):
        return
    asked = _described(config.parallel)
    nearest = nearest_topology(config)
    instead = f"set parallel.{' parallel.'.join(_changes(config.parallel, nearest))}" if nearest else "change the sizes"
    raise ConfigError(f"parallel.{asked}: {'; '.join(reasons)}. Nearest that works: {instead}")


def nearest_topology(config: Config) -> ParallelConfig | None:
    """The topology with as many processes that changes the fewest keys, and those by the least.

    None if there is none, if none of the nearest JUDGED can run, or if there are over LISTED in total.
    """
    asked, keys = config.parallel, tuple(type(config.parallel).model_fields)

    def far(parallel: ParallelConfig) -> tuple[int, float, int]:
        changed = [key for key in keys if getattr(parallel, key) != getattr(asked, key)]
        steps = sum(abs(math.log2(getattr(parallel, key) / getattr(asked, key))) for key in changed if key in DEGREES)
        return len(changed), steps, abs(parallel.zero_stage - asked.zero_stage)

    listed = list(itertools.islice(topologies(asked.world_size, asked), LISTED + 1))
    if len(listed) > LISTED:
        return None
    near = sorted(listed, key=far)[:JUDGED]
    return next((p for p in near if not refusals(config.model_copy(update={"parallel": p}))), None)


LISTED, JUDGED = 100_000, 5_000
"""Bounds that keep the search for the nearest topology to about a second: 4,096 processes have 24,000 topologies."""
DEGREES = ("dp", "tp", "pp", "sp", "ep", "hpz")


def topologies(world_size: int, like: ParallelConfig) -> Iterator[ParallelConfig]:
    """Every topology with `world_size` processes, with `like`'s own offload and hpZ and without them."""
    for tp, pp, sp in itertools.product(_divisors(world_size), repeat=3):
        if world_size % (tp * pp * sp) or pp > MOST_STAGES:
            continue
        dp = world_size // (tp * pp * sp)
        schedules = ("1f1b", "dualpipev") if pp > 1 else ("1f1b",)
        for ep, schedule in itertools.product(_divisors(dp * tp * sp), schedules):
            for stage in range(4):
                if stage == 0 and max(tp, pp, ep) > 1:
                    continue  # resolve() sets it to 1
                for hpz, offload in dict.fromkeys(
                    [(like.hpz, like.offload), (1, like.offload), (like.hpz, "none"), (1, "none")]
                ):
                    yield like.model_copy(
                        update={"dp": dp, "tp": tp, "pp": pp, "pp_schedule": schedule, "sp": sp, "ep": ep,
                                "zero_stage": stage, "hpz": hpz, "offload": offload}
                    )  # fmt: skip


@lru_cache(maxsize=4096)
def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def _described(parallel: ParallelConfig) -> str:
    keys = [key for key in (*DEGREES, "zero_stage") if getattr(parallel, key) > (key != "zero_stage")]
    named = {"pp_schedule": "1f1b", "offload": "none"}
    keys += [key for key, usual in named.items() if getattr(parallel, key) != usual]
    return " ".join(f"{key}={getattr(parallel, key)}" for key in keys)


def _changes(before: ParallelConfig, after: ParallelConfig) -> list[str]:
    keys = type(before).model_fields
    return [f"{key}={getattr(after, key)}" for key in keys if getattr(after, key) != getattr(before, key)]

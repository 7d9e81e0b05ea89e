"""Bytes that one device holds in training, by part, from the config alone (no torch).

Derived from what this code and DeepSpeed 0.19 actually allocate. Background: ZeRO (arXiv:1910.02054, section 5),
activation memory of Transformers (arXiv:2205.05198, section 4.1). Their formulas count other models' tensors, so those
here are counted layer by layer from models/*.py (models/planning/activations.py).
"""

from dataclasses import dataclass

from configs import Config
from configs.sections.optim import OPTIMIZERS

from .activations import layer_activations, layer_work, loss_work
from .shards import activation_bytes, groups, head_rank, in_flight, micro_batches, stages, tensors, tokens_per_device

REDUCE_BUCKET = 50_000_000
"""Gradient elements that are collected before they are reduced (DeepSpeed's `reduce_bucket_size`)."""
KEPT_GATHERED = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered between uses (its default `max_live_parameters` and `max_reuse_distance`)."""
NEVER_SHARED = 100_000
"""ZeRO-3 keeps parameters up to this size whole (its default `param_persistence_threshold`)."""
GAPS = (0.35, 0.55, 1.8, 1.5)
GAPS_RECOMPUTING = {"none": 0.0, "selective": 0.6, "full": 1.7}
"""On CPU glibc keeps what torch frees (trainer/processes/device.py). Its heap then exceeds what is in use by this share
of all that comes and goes in a step, by ZeRO stage and, at stages 0 and 1, with layers computed again. Fitted to runs
with glibc 2.36; another allocator has other gaps."""
COMPILED = 0.4e9
"""On CPU in bf16 oneDNN keeps up to 1,024 compiled products, and those of experts differ in their rows at every step:
measured after 20 steps of the quickstart's model, and no bound."""
CACHED_GROUPS = 144
"""Row groups that a reader keeps decoded (trainer/data)."""
READING, EVALUATING = 13e6, 10e6
"""Measured on CPU: how much a process grows with its first batch (Arrow, a thread), and with its first evaluation."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, of the pipeline's rank that needs most.

    Not all parts are allocated at the same time: `moments` are the sums that do, and `peak` is the largest.
    """

    weights: float
    gradients: float
    """When the optimizer steps."""
    optimizer: float
    """States, the weights' moving average, and fp32 master weights where the weights are not them."""
    gathered: float
    """ZeRO-3: weights that are gathered for use."""
    activations: float
    """Kept for the backward pass, of all micro-batches in flight."""
    recomputed: float
    """With activation checkpointing: of the one layer being recomputed."""
    loss: float
    """Chunk of logits, gradients of the head and of the last hidden states."""
    dispatch: float
    """Expert parallel: tokens being sent to other devices and back."""
    buckets: float
    """Gradients being reduced."""
    runtime: float
    """Libraries and their workspaces."""
    trainer: float
    """On CPU: reading data, evaluation, compiled kernels."""
    snapshot: float
    """On CPU: the copy of weights and states that a checkpoint is written from. On GPUs it is in `host`."""
    gaps: float
    """On CPU: freed memory that the C library keeps but cannot reuse."""
    host: float
    """In CPU memory beside a GPU: a checkpoint's copy, and parallel.offload; not part of the peak."""
    stage: int
    """Rank of the pipeline, from 0."""
    moments: dict[str, float]

    @property
    def allocated(self) -> float:
        """What torch's allocator is asked for on a GPU; on a CPU, where nobody tells the one from the other, `peak`."""
        return self.peak if self.trainer else self.peak - self.runtime

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def needed(self) -> float:
        """What training itself cannot do without, and what it takes where freed memory is given back at once."""
        return max(self.moments.values())

    @property
    def peak(self) -> float:
        """Of a whole run, evaluation and checkpoints included. Memory that was once resident is never returned."""
        return self.needed + self.trainer + self.snapshot + self.gaps


def memory(config: Config, cpu: bool) -> Memory:
    """Of the pipeline's rank that needs most.

    Args:
        config: resolved.
        cpu: whether it runs on CPUs, whose kernels keep other tensors and whose untouched buffers cost nothing.
    """
    return max((_of_stage(config, stage, cpu) for stage in range(config.parallel.pp)), key=lambda m: m.peak)


@dataclass
class _States:
    """Bytes of what ZeRO partitions, and of what its reductions need."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    before: float
    """Gradients that stand when a micro-batch begins, of the micro-batches before it."""
    reduction: float
    """Buffers when the last gradients are reduced; the gradients themselves where they are not among them."""
    always: float
    """What of `reduction` stands through the whole backward pass."""
    step: float
    """Temporary memory of the optimizer step."""


def _states(config: Config, stage: int, cpu: bool) -> _States:
    """What DeepSpeed's engine holds at each ZeRO stage: see trainer/engine/, and in DeepSpeed
    runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py (ZeRO-1 in bf16)."""
    parallel, zero, bf16 = config.parallel, config.parallel.zero_stage, config.train.kept_in == "bf16"
    e, own, many = activation_bytes(config), groups(config, stage), micro_batches(config) > 1
    whole, alone = float(sum(sum(group.sizes) for group in own)), parallel.dp * parallel.sp == 1
    shares = [(g.parts() if zero == 3 else g.padded // g.shards) if zero else sum(g.sizes) for g in own]
    share, kept = float(sum(shares)), 4.0 * sum(n * g.states for n, g in zip(shares, own, strict=True))
    work = _step_work(config, shares)
    if zero == 0:
        flat = 0.0 if alone else 4 * min(whole, REDUCE_BUCKET)
        weights = (4 + 2 * bf16) * whole  # with the copies of trainer/engine/precision.py
        return _States(weights, 4 * whole, kept, 0.0, 4 * whole * many, 4 * whole + flat, 0.0, work)
    masters = 4 * share + kept
    padded, filled = float(sum(g.padded for g in own)), min(whole, REDUCE_BUCKET)
    if zero == 1 and bf16:  # gradients are flattened in fp32, then sent in bf16
        return _States(padded * e, 4 * padded, masters, 0.0, 4 * padded, 4 * padded + (4 + e) * filled, 0.0, work)
    # Gradients are copied to a bucket and flattened once more for the collective. On a GPU the bucket is a whole one,
    # and two where reduction overlaps with the backward pass; untouched memory of a CPU costs nothing.
    bucket = filled * e if cpu else REDUCE_BUCKET * e * 2.0
    if zero < 3:
        touched = max(map(sum, zip(*(_over(g.touched(), max(h.shards for h in own)) for g in own), strict=True)))
        gradients = 4 * share if bf16 else float(touched * e)
        before = (gradients if zero == 2 else whole * e) * many
        always = bucket if zero == 2 and not cpu else 0.0
        return _States(
            padded * e, gradients, masters, 0.0, before, bucket + filled * e, always, work + 4.0 * max(shares)
        )
    small = 0.0 if alone else float(sum(size for g in own for size in g.sizes if size <= NEVER_SHARED))
    layer = sum(t.numel for t in tensors(config, stage) if t.matrix) // len(stages(config)[stage])
    gathered = 0.0 if alone else min(whole - small, max(KEPT_GATHERED, layer)) * e
    if parallel.hpz > 1:
        gathered += whole * e / parallel.hpz  # the second copy, shared among neighbours
    gradients = (4 if bf16 else e) * share
    return _States(
        share * e + small * e, gradients, masters, gathered, gradients,
        gradients + bucket + filled * e * (1 + 1 / (parallel.dp * parallel.sp)), 0.0 if cpu else bucket,
        work + 4.0 * max(shares),
    )  # fmt: skip


def _of_stage(config: Config, stage: int, cpu: bool) -> Memory:
    model, parallel, layers = config.model, config.parallel, stages(config)[stage]
    e, tokens, hidden = activation_bytes(config), tokens_per_device(config), model.hidden_size
    states, host = _states(config, stage, cpu), 0.0
    if parallel.offload != "none" and not cpu:  # on a CPU it all stays in the one memory there is
        host, states.optimizer = states.optimizer + states.gradients, 0.0
        if parallel.offload == "parameters":
            host, states.weights = host + states.weights, 0.0
        # Gradients leave one by one as they are made, through a buffer for the largest parameter.
        states.gradients = states.before = 4.0 * max(tensor.numel for tensor in tensors(config, stage))

    kinds = [model.is_moe_layer(i) for i in layers]
    of_kind = {kind: layer_activations(config, kind, cpu) for kind in set(kinds)}
    every = config.train.recompute_every
    again = [bool(every) and (i + 1) % every == 0 for i in layers]
    kept = {i: tokens * hidden * e if redo else of_kind[k] for i, k, redo in zip(layers, kinds, again, strict=True)}
    passing = [sum(kept[i] for i in part) for part, _ in in_flight(config, stage)]
    activations = sum(size * count for size, (_, count) in zip(passing, in_flight(config, stage), strict=True))
    recomputed = max((of_kind[k] for k, redo in zip(kinds, again, strict=True) if redo), default=0.0)

    loss = head = 0.0
    if stage == head_rank(config):
        loss, head = loss_work(config, cpu)
    dispatch = 0.0
    if parallel.ep > 1 and any(kinds):  # assignments sent and received, forwards, and their gradients
        dispatch = 4.0 * tokens * model.top_k * hidden * e
    work = max(layer_work(config, kind) for kind in of_kind)
    runtime = runtime_bytes(parallel.zero_stage, cpu)
    copied = _snapshot(config, stage)
    host += 0.0 if cpu else copied
    base = states.weights + states.optimizer + states.gathered + states.always + runtime
    moments = {
        "loss": base + states.before + activations + loss,
        "start of backward": base + states.before + activations + recomputed + max(head, work) + dispatch,
        "reduction": base + states.reduction - states.always + activations - passing[-1],
        "optimizer step": base + states.gradients + states.step,
    }
    buckets = max(0.0, states.reduction - states.gradients)
    passing_by = max(moments.values()) - states.weights - states.optimizer - runtime
    share = GAPS[parallel.zero_stage]
    if parallel.zero_stage < 2:
        share = max(share, GAPS_RECOMPUTING[config.train.activation_checkpointing])
    gaps = share * passing_by if cpu else 0.0
    trainer = READING + _cached_data(config) + EVALUATING + COMPILED * (e == 2 and any(kinds)) if cpu else 0.0
    return Memory(
        states.weights, states.gradients, states.optimizer, states.gathered, activations, recomputed, loss, dispatch,
        buckets, runtime, trainer, copied if cpu else 0.0, gaps, host, stage, moments,
    )  # fmt: skip


def _snapshot(config: Config, stage: int) -> float:
    """Bytes of the fp32 weights and states that one process writes into a checkpoint (trainer/checkpoint/save.py)."""
    own, zero = groups(config, stage), config.parallel.zero_stage
    if zero == 0:
        return sum(4.0 * sum(g.sizes) * (1 + g.states) for g in own) / config.parallel.world_size
    return sum(4.0 * g.padded / g.shards * (1 + g.states) for g in own)


def _cached_data(config: Config) -> float:
    """Bytes of decoded row groups: of the run's data if they are as large as those that it would prepare itself."""
    token = 2 if (config.model.vocab_size or 0) <= 1 << 16 else 4
    return float(CACHED_GROUPS * config.data.prepare.row_group_tokens * token)


def _over(touched: list[int], ranks: int) -> list[int]:
    """Values of a smaller group's processes for each of all."""
    return [touched[rank % len(touched)] for rank in range(ranks)]


def _step_work(config: Config, shares: list[int]) -> float:
    """Bytes that an optimizer without a fused kernel needs while it steps.

    Args:
        shares: elements of each group that the process updates.
    """
    kernel = OPTIMIZERS[config.optim.name].kernel
    if kernel == "fused":
        return 0.0
    if kernel == "foreach":  # a root of a whole group
        return 4.0 * max(shares)
    return 8.0 * (max(shares) if config.parallel.zero_stage else max(t.numel for t in tensors(config)))


def runtime_bytes(zero: int, cpu: bool) -> float:
    """Seen on CPU: a process grows by this much with a model of no size, as code is loaded at its first use. On GPUs
    the allocator's own figure counts no library."""
    if not cpu:
        return 1.0e9  # assumed: cuBLAS workspaces, NCCL buffers, the CUDA context
    return 22e6 if zero == 0 else 70e6

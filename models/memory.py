"""Bytes that one device holds in training, by part, from the config alone (no torch).

Derived from what this code and DeepSpeed 0.19 really keep. The ideas: ZeRO (arXiv:1910.02054, section 5), activation
memory of Transformers (arXiv:2205.05198, section 4.1). Their formulas count other models' tensors, so those here are
counted layer by layer from models/*.py.

Symbols as in the code: S tokens of a micro-batch on one device, H hidden size, N query and K key heads of size D, I
width of an MLP, E experts, k experts per token, A = S * k assignments, V vocabulary, C tokens of a chunk of the loss;
e bytes of an activation.
"""

from dataclasses import dataclass

from configs import Config

from .shards import activation_bytes, groups, micro_batches, shape, stages, tensors, tokens_per_device

REDUCE_BUCKET = 500_000_000
"""Elements that DeepSpeed gathers before it reduces them (its default `reduce_bucket_size`)."""
KEPT_GATHERED = 1_000_000_000
"""Elements that ZeRO-3 keeps whole between uses (its default `max_live_parameters` and `max_reuse_distance`)."""
NEVER_SHARED = 100_000
"""ZeRO-3 keeps parameters up to this size whole (its default `param_persistence_threshold`)."""
LONGEST_KERNEL = 512
"""Keys up to which models/attention.py takes its own CPU kernel, which keeps probabilities in fp32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, of the pipeline stage that needs most.

    Not all parts stand at once: `moments` are the sums that do, and `peak` is the largest.
    """

    weights: float
    gradients: float
    """When the optimizer steps."""
    optimizer: float
    """States, and fp32 master weights where the weights are not them."""
    gathered: float
    """ZeRO-3: weights that stand whole for use."""
    activations: float
    """Kept for the backward pass, of all micro-batches in flight."""
    recomputed: float
    """With activation checkpointing: of the one layer that is computed again."""
    loss: float
    """Chunk of logits, gradients of the head and of the last hidden states."""
    dispatch: float
    """Expert parallel: tokens on their way to other devices and back."""
    buckets: float
    """Gradients on their way through collectives."""
    runtime: float
    """Libraries and their workspaces."""
    host: float
    """In CPU memory, with parallel.offload; not a part of the peak."""
    stage: int
    """Pipeline stage, from 0."""
    moments: dict[str, float]

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return max(self.moments.values())


def layer_activations(config: Config, moe: bool, cpu: bool) -> float:
    """Bytes that one layer keeps for its backward pass, its input included: what autograd saves in models/*.py.

    Tensor parallelism splits what lies between column- and row-wise products; the residual stream stays whole.
    """
    model, tp = config.model, config.parallel.tp
    hidden, heads, kv, size = shape(model)
    tokens, e, length = tokens_per_device(config), activation_bytes(config), config.train.seq_len
    q, k = heads * size // tp, kv * size // tp
    kept: float = 2 * tokens * (hidden * e + 4)  # x and 1 / rms of both norms
    kept += 2 * tokens * hidden * e  # their outputs, which the projections keep
    if model.qk_norm:
        kept += tokens * ((q + k) * e + (heads + kv) // tp * 4)
    kept += tokens * (2 * q + 2 * k) * e  # queries, keys, values, the output projection's input
    if cpu and length <= LONGEST_KERNEL:
        if e == 4:
            blocks = range(0, length, 64)
            pairs = sum((min(at + 64, length) - at) * min(at + 64, length) for at in blocks)
            kept += tokens / length * heads / tp * pairs * 4  # probabilities
    else:
        kept += tokens * heads / tp * 4  # log of the sum
    if not moe:
        return kept + 4 * tokens * (model.intermediate_size or 0) // tp * e  # gate, silu(gate), up, their product
    experts, top_k, width = model.num_experts, model.top_k, model.expert_size or 0
    kept += tokens * (2 * experts * 4 + top_k * 16) + (tokens * hidden * 4 if e == 2 else 0)  # the router, in fp32
    assigned = tokens * top_k
    if cpu and config.parallel.ep == 1:
        slots = assigned if e == 4 else assigned + 16 * experts  # rounded up to 32 for each expert
        kept += slots * (2 * width * e + e + 16) + assigned * 8
    else:
        kept += assigned * (hidden + 5 * width) * e + assigned * (e + 16)
    return kept + 4 * tokens * model.shared_expert_size // tp * e


def layer_work(config: Config, moe: bool) -> float:
    """Bytes that come and go within one layer's backward pass: gradients between its products."""
    model, tokens, e = config.model, tokens_per_device(config), activation_bytes(config)
    hidden, heads, _, size = shape(model)
    width = model.intermediate_size or 0
    mlp = tokens * model.top_k * hidden if moe else 3 * tokens * width // config.parallel.tp
    return (max(mlp, 3 * tokens * heads * size // config.parallel.tp) + 2 * tokens * hidden) * e


def memory(config: Config, cpu: bool) -> Memory:
    """Of the pipeline stage that needs most.

    Args:
        config: resolved.
        cpu: whether it runs on CPUs, whose kernels keep other tensors and whose untouched buffers cost nothing.
    """
    return max((_of_stage(config, stage, cpu) for stage in range(config.parallel.pp)), key=lambda m: m.peak)


@dataclass
class _States:
    """Bytes of what ZeRO shares out, and of what its reductions need."""

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
    """What the optimizer needs for a moment."""


def _states(config: Config, stage: int, cpu: bool) -> _States:
    """What DeepSpeed's engine holds at each ZeRO stage: see trainer/engine.py, and in DeepSpeed
    runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py (ZeRO-1 in bf16)."""
    parallel, zero, bf16 = config.parallel, config.parallel.zero_stage, config.train.precision == "bf16"
    e, own, many = activation_bytes(config), groups(config, stage), micro_batches(config) > 1
    whole, alone = float(sum(sum(group.sizes) for group in own)), parallel.dp * parallel.sp == 1
    shares = [(g.parts() if zero == 3 else g.padded // g.shards) if zero else sum(g.sizes) for g in own]
    share, kept = float(sum(shares)), 4.0 * sum(n * g.states for n, g in zip(shares, own, strict=True))
    work = _step_work(config, shares)
    if zero == 0:
        flat = 0.0 if alone else 4 * min(whole, REDUCE_BUCKET)
        return _States(4 * whole, 4 * whole, kept, 0.0, 4 * whole * many, 4 * whole + flat, 0.0, work)
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
    passing = sum(tokens * hidden * e if redo else of_kind[k] for k, redo in zip(kinds, again, strict=True))
    recomputed = max((of_kind[k] for k, redo in zip(kinds, again, strict=True) if redo), default=0.0)
    if parallel.zero_stage == 0 and config.train.precision == "bf16":
        # Each layer's weights in bf16 are kept like activations, but where the layer is computed again.
        passing += 2.0 * sum(t.numel for t in tensors(config, stage)) * again.count(False) / len(again)
    in_flight = min(micro_batches(config), parallel.pp - stage)  # one forward, one backward (arXiv:2104.04473)
    activations = passing * in_flight

    loss = head = 0.0
    if stage == parallel.pp - 1:
        loss, head = _loss(config, cpu)
    dispatch = 0.0
    if parallel.ep > 1 and any(kinds):  # assignments sent and received, forwards, and their gradients
        dispatch = 4.0 * tokens * model.top_k * hidden * e
    work = max(layer_work(config, kind) for kind in of_kind)
    runtime = runtime_bytes(parallel.zero_stage, cpu)
    base = states.weights + states.optimizer + states.gathered + states.always + runtime
    moments = {
        "loss": base + states.before + activations + loss,
        "start of backward": base + states.before + activations + recomputed + max(head, work) + dispatch,
        "reduction": base + states.reduction - states.always + passing * (in_flight - 1),
        "optimizer step": base + states.gradients + states.step,
    }
    buckets = max(0.0, states.reduction - states.gradients)
    return Memory(
        states.weights, states.gradients, states.optimizer, states.gathered, activations, recomputed, loss, dispatch,
        buckets, runtime, host, stage, moments,
    )  # fmt: skip


def _loss(config: Config, cpu: bool) -> tuple[float, float]:
    """Bytes of the loss (models/loss.py) and of the routers' losses: as they are computed, and as backward begins."""
    model, e, tokens = config.model, activation_bytes(config), tokens_per_device(config)
    chunk = min(model.loss_chunk, tokens)
    table, several = (model.vocab_size or 0) * model.hidden_size, tokens > chunk
    logits = chunk * (model.vocab_size or 0) * (e if cpu or e == 4 else e + 4)
    kept = table * (4 if several else e) + 2 * tokens * model.hidden_size * e
    routers = 3 * sum(map(model.is_moe_layer, range(model.num_layers))) * tokens * model.num_experts * 4
    return float(logits + kept + routers + table * e * several), float(kept + routers + table * 4)


def _over(touched: list[int], ranks: int) -> list[int]:
    """Values of a smaller group's processes for each of all."""
    return [touched[rank % len(touched)] for rank in range(ranks)]


def _step_work(config: Config, shares: list[int]) -> float:
    """Bytes that an optimizer without a fused kernel needs while it steps.

    Args:
        shares: elements of each group that the process updates.
    """
    name = config.optim.name
    if name in ("adamw", "adam", "sgd"):
        return 0.0
    if name in ("rmsprop", "adagrad"):  # a root of a whole group
        return 4.0 * max(shares)
    return 8.0 * (max(shares) if config.parallel.zero_stage else max(t.numel for t in tensors(config)))


def runtime_bytes(zero: int, cpu: bool) -> float:
    """Seen on CPU: a process grows by this much with a model of no size, as code is loaded at its first use. On GPUs
    the allocator's own figure counts no library."""
    if not cpu:
        return 1.0e9  # assumed: cuBLAS workspaces, NCCL buffers, the CUDA context
    return 22e6 if zero == 0 else 70e6

"""What a run will need and reach: memory, communication, step time and MFU, predicted from its config (no torch).

A prediction is only as good as its formulas: `benchmarks/planner.py` checks those for memory against measurements.
"""

import math
from dataclasses import dataclass
from typing import Any

from configs import Config

from .activations import layer_activations
from .cost import Parameters, forward_flops_per_token, parameters, training_flops_per_token
from .devices import HEADROOM, Device
from .memory import KEPT_GATHERED, Memory, memory
from .shards import activation_bytes, groups, head_rank, micro_batches, shape, stages, tensors, tokens_per_device

OPERATIONS, ROUTING, PER_EXPERT = 110, 45, 11
"""Of a dense layer, of a router beside it, and of each expert; see `_operations`."""


@dataclass(frozen=True)
class Traffic:
    """What one device sends in one step for one purpose."""

    kind: str
    sent: float
    """Bytes out of one device."""
    seconds: float
    """Time if nothing else ran."""
    hidden: bool
    """Whether it can overlap with the backward pass."""


@dataclass(frozen=True)
class Plan:
    """The prediction for one run on one kind of device."""

    device: Device
    devices: int
    parameters: Parameters
    flops_per_token: float
    """Training FLOPs, without recomputation."""
    tokens_per_step: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    compute_time: float
    """Seconds of a step spent on matrix products, recomputation included."""
    memory_time: float
    """Seconds spent moving activations and states through memory."""
    launch_time: float
    """Launch overhead of small operations, in seconds, on a CPU."""
    bubble: float
    """Fraction of the step that a pipeline rank waits; see `_bubble`."""
    step_time: float
    mfu: float
    """Model FLOPs (attention included) over peak FLOPs, as in PaLM (arXiv:2204.02311, appendix B)."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_time

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * 86400

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.device.memory * (1 - HEADROOM)

    def summary(self) -> dict[str, Any]:
        """Plain numbers: bytes, seconds, bytes/s."""
        parts = {key: value for key, value in vars(self.memory).items() if key not in ("moments", "stage")}
        return {
            "device": self.device.name,
            "devices": self.devices,
            "parameters": self.parameters.total,
            "active_parameters": self.parameters.active,
            "flops_per_token": self.flops_per_token,
            "tokens_per_step": self.tokens_per_step,
            "memory": {"peak": self.memory.peak, "parts": parts, "moments": self.memory.moments},
            "memory_of_device": self.device.memory if math.isfinite(self.device.memory) else None,
            "fits": self.fits,
            "traffic": {item.kind: {"sent": item.sent, "seconds": item.seconds} for item in self.traffic},
            "step_time": self.step_time,
            "compute_time": self.compute_time,
            "memory_time": self.memory_time,
            "launch_time": self.launch_time,
            "bubble": self.bubble,
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_day": self.tokens_per_day,
        }


def predict(config: Config, device: Device) -> Plan:
    """Predict a run.

    Args:
        config: resolved; its topology is one that can run.
    """
    devices = config.parallel.world_size
    tokens = config.train.global_batch * config.train.seq_len
    flops = training_flops_per_token(config.model, config.train.seq_len)
    held = memory(config, device.is_cpu)
    traffic = tuple(item for item in _traffic(config, device) if item.sent)
    rate = device.flops[config.train.kept_in]  # used for fp8 too: how much it gains depends on the shapes
    longer = _expert_flops(config) * (1 / device.experts - 1)  # in FLOPs of other products
    computed = tokens * (flops + _flops_again(config) + _flops_of_padding(config) + longer) / devices
    compute = computed / (rate * device.attained) * _unevenness(config)
    # A batch that does not divide evenly is padded, and the padding is computed as well.
    filled = micro_batches(config) * config.parallel.dp * (config.train.micro_batch or 1) / config.train.global_batch
    compute *= filled
    steps_flops = _optimizer_flops(config) / (device.flops.get("bf16", rate) * device.attained)
    bandwidth = device.bandwidth * device.bus
    moved = _elementwise(config, device.is_cpu) / min(bandwidth, device.elementwise) + _states(config, held) / bandwidth
    launched = _operations(config) * device.launch
    bubble = _bubble(config)
    working = (compute + moved + launched) / (1 - bubble) + steps_flops
    exposed = sum(item.seconds for item in traffic if not item.hidden)
    behind = sum(item.seconds for item in traffic if item.hidden)
    # Communication overlaps with the backward pass, two thirds of the work; on CPUs nothing overlaps.
    exposed += behind if device.is_cpu else max(0.0, behind - working * 2 / 3)
    step = working + exposed
    return Plan(
        device=device,
        devices=devices,
        parameters=parameters(config.model),
        flops_per_token=flops,
        tokens_per_step=tokens,
        memory=held,
        traffic=traffic,
        compute_time=compute + steps_flops,
        memory_time=moved,
        launch_time=launched,
        bubble=bubble,
        step_time=step,
        mfu=tokens * flops / (step * devices * rate),
    )


def _bubble(config: Config) -> float:
    """Of p ranks and m micro-batches: w / (m + w), where w is the wait in micro-batches of a rank's work.

    With one stage on each rank w = p - 1 (arXiv:2104.04473, section 2.2). In a V, as DeepSpeed runs it (weight
    gradients are not put off, and a pass over one stage never overlaps another's), w = (5 p - 6) / 6 where a backward
    pass takes twice a forward pass: counted by running its DualPipeVSchedule for p = 2 to 8.
    """
    p, m = config.parallel.pp, micro_batches(config)
    wait = p - 1 if config.parallel.stages == p else (5 * p - 6) / 6
    return wait / (m + wait)


def _unevenness(config: Config) -> float:
    """FLOPs of the pipeline's rank that has most over the mean."""
    whole = forward_flops_per_token(config.model, config.train.seq_len)
    head = 2 * config.model.hidden_size * (config.model.vocab_size or 0)
    layer = (whole - head) / config.model.num_layers
    cut = stages(config)
    work = [len(layers) * layer + head * (rank == head_rank(config)) for rank, layers in enumerate(cut)]
    return max(work) * len(cut) / whole


def _recomputed_share(config: Config) -> float:
    every = config.train.recompute_every
    layers = config.model.num_layers
    return sum((i + 1) % every == 0 for i in range(layers)) / layers if every else 0.0


def _expert_flops(config: Config) -> float:
    """Training FLOPs of a token in the experts that it is routed to: forward, and twice that backward."""
    model = config.model
    return 6 * parameters(model).experts * model.top_k / model.num_experts if model.is_moe else 0.0


def _flops_again(config: Config) -> float:
    """FLOPs per token of layers recomputed in the backward pass: a whole forward pass except the head."""
    head = 2 * config.model.hidden_size * (config.model.vocab_size or 0)
    return _recomputed_share(config) * (forward_flops_per_token(config.model, config.train.seq_len) - head)


def _flops_of_padding(config: Config) -> float:
    """Training FLOPs per token of the empty slots of model.pad_to_capacity."""
    model = config.model
    if not model.pad_to_capacity:
        return 0.0
    tokens = tokens_per_device(config)
    empty = model.num_experts * model.capacity(tokens) / tokens - model.top_k
    return 3 * 2 * model.num_moe_layers * empty * 3 * model.hidden_size * (model.expert_size or 0)


def _optimizer_flops(config: Config) -> float:
    """Of Muon's five Newton-Schulz iterations, in bf16, over every r x c matrix, r <= c: 4 r^2 c + 2 r^3 each
    (trainer/engine/optim.py). Every process makes all of its own."""
    if config.optim.name != "muon":
        return 0.0
    total, hidden = 0.0, config.model.hidden_size
    for tensor in tensors(config):
        if tensor.matrix and not (tensor.embedding or tensor.head):
            rows, columns = sorted((hidden, tensor.numel / tensor.count / hidden))
            total += 5 * tensor.count * (4 * rows**2 * columns + 2 * rows**3)
    return total


def _elementwise(config: Config, cpu: bool) -> float:
    """Bytes that elementwise passes of one device read and write in a step.

    What is kept of a layer is written and read by the forward pass, and read and written again, as its gradient, by the
    backward pass; so are logits, and on CPU the rows that experts gather and give back.
    """
    model, e = config.model, activation_bytes(config)
    tokens = tokens_per_device(config)
    again = 1 + _recomputed_share(config) / 2
    kept = 0.0
    for index in max(stages(config), key=len):
        moe = model.is_moe_layer(index)
        kept += layer_activations(config, moe, cpu) + 2 * tokens * model.top_k * model.hidden_size * e * (moe and cpu)
    logits = tokens * (model.vocab_size or 0) * e
    return micro_batches(config) * (4 * kept * again + 4 * logits)


def _states(config: Config, held: Memory) -> float:
    """Bytes of states that one device reads and writes in a step: each state read and written once by the optimizer,
    each gradient twice (norm, step), and what reductions copy. bf16 at ZeRO-0 adds its gradients to fp32 ones."""
    cast = 2 * held.weights if config.parallel.zero_stage == 0 and config.train.kept_in == "bf16" else 0.0
    copied = 2 * min(held.buckets, 2 * held.weights) + cast
    return 2 * (held.weights + held.optimizer) + 3 * held.gradients + micro_batches(config) * copied


def _operations(config: Config) -> float:
    """Small operations, forwards and backwards, that a step of one device makes: those that torch's profiler counts in
    a layer of models/*.py, four of them for one that is launched, passed back and accumulated."""
    model, every = config.model, 1 + _recomputed_share(config) / 3
    moe = [model.is_moe_layer(index) for index in max(stages(config), key=len)]
    layers = sum(OPERATIONS + (ROUTING + PER_EXPERT * model.num_experts) * kind for kind in moe)
    return micro_batches(config) * layers * every


def _traffic(config: Config, device: Device) -> list[Traffic]:
    """What every device sends in one step. A ring of n sends 2 (n - 1) / n of a buffer to all-reduce it, half of that
    to reduce-scatter or to all-gather it; ZeRO-3's volume is 1.5 times ZeRO-2's (arXiv:1910.02054, section 7)."""
    parallel, model, train = config.parallel, config.model, config.train
    e, count, inner = activation_bytes(config), micro_batches(config), parallel.tp * parallel.sp
    heaviest = max(range(parallel.pp), key=lambda s: sum(sum(g.sizes) for g in groups(config, s)))
    hidden, heads, kv, size = shape(model)
    layers = max(stages(config), key=len)
    moe = sum(model.is_moe_layer(i) for i in layers)
    tokens = tokens_per_device(config)
    again = 1 if train.recompute_every else 0
    zero, found = parallel.zero_stage, []

    def add(kind: str, sent: float, ranks: int, stride: int, *, hidden: bool = False, to_all: bool = False) -> None:
        found.append(Traffic(kind, sent, _seconds(device, sent, ranks, stride, to_all), hidden))

    for group in groups(config, heaviest):
        n, elements = group.shards, sum(group.sizes)
        part = (n - 1) / n
        # Expert groups skip over the expert-parallel ranks.
        stride = inner * (parallel.dp * parallel.sp // n if n else 1)
        if zero == 0:
            add("dp all-reduce", 2 * part * 4 * elements, n, stride)
        elif zero == 3:
            kept = elements <= KEPT_GATHERED
            add("dp all-gather", part * e * elements * count * (1 if kept else 2), n, stride, hidden=True)
            add("dp reduce-scatter", part * e * elements * count, n, stride, hidden=True)
        else:
            # DeepSpeed all-reduces whole buckets at ZeRO 1 and 2 alike, ZeRO-2 after each micro-batch.
            times = count if zero == 2 else 1
            add("dp all-reduce", 2 * part * e * elements * times, n, stride, hidden=zero == 2)
            add("dp all-gather", part * e * elements, n, stride)
    stream = tokens * hidden * e * count
    if parallel.tp > 1:
        share = 2 * (parallel.tp - 1) / parallel.tp
        # After attention, and after a dense or shared MLP; experts stand whole on every rank.
        sums = 2 * len(layers) - (0 if model.shared_expert_size else moe)
        add("tp all-reduce", share * stream * sums * (2 + again), parallel.tp, 1)
    if parallel.ep > 1 and moe:
        share = (parallel.ep - 1) / parallel.ep
        add("ep all-to-all", share * stream * model.top_k * moe * (4 + 2 * again), parallel.ep, inner, to_all=True)
    if parallel.sp > 1:
        share = (parallel.sp - 1) / parallel.sp
        width = (2 * heads + 2 * kv) * size
        sent = share * tokens * width * e * count * len(layers) * (2 + again)
        add("sp all-to-all", sent, parallel.sp, 1, to_all=True)
    if parallel.pp > 1:
        add("pp send", 2 * stream * parallel.stages / parallel.pp, 2, parallel.dp * inner)
    merged: dict[str, Traffic] = {}
    for item in found:
        old = merged.get(item.kind, Traffic(item.kind, 0.0, 0.0, item.hidden))
        merged[item.kind] = Traffic(item.kind, old.sent + item.sent, old.seconds + item.seconds, item.hidden)
    return list(merged.values())


def _seconds(device: Device, sent: float, ranks: int, stride: int, to_all: bool) -> float:
    """Time for `ranks` devices, each `stride` after the one before, to send `sent` bytes each.

    Within a node at the fast link's rate. A ring over nodes leaves a node once for all its members there, which share
    their network ports; in an all-to-all each device sends most of its data through its own.
    """
    if ranks * stride <= device.per_node:
        return sent / (device.node_link * device.bus)
    local = max(1, device.per_node // stride)
    if to_all:
        outside = (ranks - local) / max(1, ranks - 1)
        return sent * max(outside / device.network, (1 - outside) / device.node_link) / device.bus
    return sent / (min(device.node_link, device.network * local) * device.bus)

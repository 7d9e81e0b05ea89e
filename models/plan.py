"""What a run will need and reach: memory, communication, step time and MFU, predicted from its config (no torch).

A prediction has no more truth than its formulas: `benchmarks/planner.py` holds those of memory to what is measured.
"""

import math
from dataclasses import dataclass
from typing import Any

from configs import Config

from .cost import Parameters, forward_flops_per_token, parameters, training_flops_per_token
from .devices import HEADROOM, Device
from .memory import KEPT_GATHERED, Memory, layer_activations, memory
from .shards import activation_bytes, groups, micro_batches, shape, stages, tokens_per_device


@dataclass(frozen=True)
class Traffic:
    """What one device sends in one step for one purpose."""

    kind: str
    sent: float
    """Bytes out of one device."""
    seconds: float
    """As if nothing else went on."""
    hidden: bool
    """Whether it can go on behind the backward pass."""


@dataclass(frozen=True)
class Plan:
    """The prediction for one run on one kind of device."""

    device: Device
    devices: int
    parameters: Parameters
    flops_per_token: float
    """Training FLOPs, nothing computed again."""
    tokens_per_step: int
    memory: Memory
    traffic: tuple[Traffic, ...]
    compute_time: float
    """Seconds of a step in which a device multiplies matrices, what is computed again included."""
    memory_time: float
    """Seconds in which it moves activations and states through its memory."""
    bubble: float
    """Share of the step in which a pipeline stage waits: (p - 1) / (m + p - 1)."""
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
    rate = device.flops[config.train.precision]
    compute = tokens * (flops + _flops_again(config)) / devices / (rate * device.attained) * _unevenness(config)
    # A batch that does not divide is filled up, and the filling is computed as well.
    filled = micro_batches(config) * config.parallel.dp * (config.train.micro_batch or 1) / config.train.global_batch
    compute *= filled
    moved = _moved(config, held) / (device.bandwidth * device.bus)
    stage_count = config.parallel.pp
    bubble = (stage_count - 1) / (micro_batches(config) + stage_count - 1)
    working = (compute + moved) / (1 - bubble)
    exposed = sum(item.seconds for item in traffic if not item.hidden)
    behind = sum(item.seconds for item in traffic if item.hidden)
    # What hides does so behind the backward pass, two thirds of the work; on CPUs nothing overlaps.
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
        compute_time=compute,
        memory_time=moved,
        bubble=bubble,
        step_time=step,
        mfu=tokens * flops / (step * devices * rate),
    )


def _unevenness(config: Config) -> float:
    """FLOPs of the pipeline stage that has most over the mean."""
    whole = forward_flops_per_token(config.model, config.train.seq_len)
    head = 2 * config.model.hidden_size * (config.model.vocab_size or 0)
    layer = (whole - head) / config.model.num_layers
    cut = stages(config)
    return max(len(layers) * layer + head * (layers is cut[-1]) for layers in cut) * len(cut) / whole


def _recomputed_share(config: Config) -> float:
    every = config.train.recompute_every
    layers = config.model.num_layers
    return sum((i + 1) % every == 0 for i in range(layers)) / layers if every else 0.0


def _flops_again(config: Config) -> float:
    """FLOPs per token of layers computed again in the backward pass: all of a forward pass but the head."""
    head = 2 * config.model.hidden_size * (config.model.vocab_size or 0)
    return _recomputed_share(config) * (forward_flops_per_token(config.model, config.train.seq_len) - head)


def _moved(config: Config, held: Memory) -> float:
    """Bytes that one device moves through its memory in a step beside matrix products.

    What is kept of a layer is written and read by the forward pass, and read and written again, as its gradient, by the
    backward pass. Each state is read and written once by the optimizer, each gradient twice (norm, step).
    """
    model = config.model
    layers = max(stages(config), key=len)
    again = 1 + _recomputed_share(config) / 2
    kept = sum(layer_activations(config, model.is_moe_layer(i), False) for i in layers)
    logits = tokens_per_device(config) * (model.vocab_size or 0) * activation_bytes(config)
    states = 2 * (held.weights + held.optimizer) + 3 * held.gradients
    return micro_batches(config) * (4 * kept * again + 4 * logits) + states


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
        add("pp send", 2 * stream, 2, parallel.dp * inner)
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

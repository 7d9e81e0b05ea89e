"""Which tensors one process holds in a topology, in which groups, and how they are partitioned (no torch).

As trainer/engine/parallel.py (what is split), trainer/engine/optim.py (groups) and DeepSpeed's ZeRO (shares) make them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from configs import Config, ModelConfig
from configs.sections.optim import OPTIMIZERS
from configs.stages import layers_of_ranks, stage_layers, stages_of_rank


@dataclass(frozen=True)
class Tensor:
    """One parameter as a process holds it before ZeRO partitions it."""

    numel: int
    matrix: bool = True
    embedding: bool = False
    head: bool = False
    expert: bool = False
    count: int = 1
    """Number of matrices stacked in it."""


def activation_bytes(config: Config) -> int:
    return 4 if config.train.precision == "fp32" else 2


def tokens_per_device(config: Config) -> int:
    """Tokens of one micro-batch that one device works on."""
    assert config.train.micro_batch
    return config.train.micro_batch * config.train.seq_len // config.parallel.sp


def micro_batches(config: Config) -> int:
    """Micro-batches of one data-parallel rank in one step."""
    assert config.train.micro_batch
    return math.ceil(math.ceil(config.train.global_batch / config.train.micro_batch) / config.parallel.dp)


def stages(config: Config) -> list[list[int]]:
    """The decoder layers of each of a pipeline's ranks, which hold one stage each, or two."""
    return layers_of_ranks(config.model.num_layers, config.parallel)


def head_rank(config: Config) -> int:
    """The rank of the pipeline that computes the loss: the last, and in a V the first."""
    return config.parallel.pp - 1 if config.parallel.stages == config.parallel.pp else 0


def in_flight(config: Config, rank: int) -> list[tuple[range, int]]:
    """For each stage that a rank holds: its layers, and the most micro-batches whose activations it keeps at once.

    One forward, one backward: arXiv:2104.04473, section 2.2. In a V all ranks keep as much, in the order of DeepSpeed's
    runtime/pipe/schedule.py: before the main step of DualPipeVSchedule a rank has taken 2 * pp - rank - 1 micro-batches
    through the one stage and rank + 1 through the other, then it takes one more.
    """
    parallel = config.parallel
    cut = [stage_layers(config.model.num_layers, parallel.stages)[stage] for stage in stages_of_rank(parallel, rank)]
    if len(cut) == 2:
        return [(cut[0], 2 * parallel.pp - rank), (cut[1], rank + 1)]
    return [(cut[0], min(micro_batches(config), parallel.pp - rank))]


def tensors(config: Config, stage: int = 0) -> Iterator[Tensor]:
    """The parameters of one process of a pipeline's rank, in the module's order."""
    model, tp, ep = config.model, config.parallel.tp, config.parallel.ep
    hidden, heads, kv, size = shape(model)
    layers, last = stages(config)[stage], stage == head_rank(config)
    table = Tensor((model.vocab_size or 0) * hidden, embedding=True)
    if stage == 0 or (last and model.tie_embeddings):
        yield table
    for index in layers:
        yield Tensor(hidden, matrix=False)
        for columns, bias in ((heads, model.qkv_bias), (kv, model.qkv_bias), (kv, model.qkv_bias), (heads, False)):
            yield Tensor(hidden * columns * size // tp)
            if bias:
                yield Tensor(columns * size // tp, matrix=False)
        if model.qk_norm:
            yield from [Tensor(size, matrix=False)] * 2
        yield Tensor(hidden, matrix=False)
        if not model.is_moe_layer(index):
            yield from [Tensor(hidden * (model.intermediate_size or 0) // tp)] * 3
            continue
        if model.router != "hash":
            yield Tensor(hidden * model.num_experts)
        held = model.num_experts // ep
        one = held * hidden * (model.expert_size or 0)
        # With expert parallelism DeepSpeed holds gate and up apart; tensor parallelism leaves experts whole.
        apart = [Tensor(one, expert=True, count=held)] * 3
        yield from apart if ep > 1 else [Tensor(2 * one, count=held), Tensor(one, count=held)]
        if model.shared_expert_size:
            yield from [Tensor(hidden * model.shared_expert_size // tp)] * 3
        if model.shared_expert_gate:
            yield Tensor(hidden)
    if last:
        yield Tensor(hidden, matrix=False)
        if not model.tie_embeddings:
            yield Tensor((model.vocab_size or 0) * hidden, head=True)


def shape(model: ModelConfig) -> tuple[int, int, int, int]:
    """(hidden size, query heads, key heads, head size)."""
    heads = model.num_heads
    return model.hidden_size, heads, model.num_kv_heads or heads, model.head_dim or model.hidden_size // heads


@dataclass
class Group:
    """Parameters that the optimizer treats alike, in order, how many processes share their states, and how many of
    these there are for each weight, its moving average included."""

    sizes: list[int]
    shards: int
    states: int

    @property
    def padded(self) -> int:
        """Elements of the flat buffer of ZeRO 1 and 2, which divides by twice the processes."""
        return math.ceil(sum(self.sizes) / (2 * self.shards)) * 2 * self.shards

    def touched(self) -> list[int]:
        """For each process the elements of the parameters that its share touches, wholly or in part."""
        share = self.padded // self.shards
        change = [0] * (self.shards + 1)
        for start, size in zip(accumulate(self.sizes, initial=0), self.sizes, strict=False):
            change[start // share] += size
            change[(start + size - 1) // share + 1] -= size
        return list(accumulate(change))[: self.shards]

    def parts(self) -> int:
        """Elements of one process at ZeRO-3, which cuts each parameter by itself."""
        return sum(math.ceil(size / self.shards) for size in self.sizes)


@lru_cache(maxsize=16)
def groups(config: Config, stage: int) -> list[Group]:
    """As trainer/engine/optim.py makes them."""
    optim, parallel = config.optim, config.parallel
    found: dict[tuple[bool, bool, bool], Group] = {}
    for tensor in tensors(config, stage):
        matrix = tensor.matrix and not tensor.embedding
        muon = optim.name == "muon" and matrix and not tensor.head
        key = (muon, matrix or optim.decay_all, tensor.expert)
        shards = parallel.dp * parallel.sp
        if tensor.expert:
            shards = max(1, shards * parallel.tp // parallel.ep)
        optimizer = OPTIMIZERS["adamw" if optim.name == "muon" and not muon else optim.name]
        states = optimizer.states - (optimizer.has_momentum and not optim.momentum) + optim.followers
        found.setdefault(key, Group([], shards, states)).sizes.append(tensor.numel)
    return list(found.values())

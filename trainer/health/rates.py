"""Rates of each process's device, measured in some 100 ms, with a matrix product checked against the exact result."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from models.planning.devices import DEVICES, Device, cpu

TILE = 512
SIDE = {"cpu": TILE, "cuda": 8 * TILE}
"""Rows of the multiplied matrices: enough for the device's full rate."""
COPIED = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements that are copied."""
SMALL_OPERATIONS = 20
EXACT = 256
"""Every integer up to here is exact in every precision, bf16 included."""


@dataclass(frozen=True)
class Rates:
    """What one process measured, each a median of a few timings.

    Attributes:
        product, bf16: FLOP/s of a matrix product in the precision that weights are held in, and in bf16.
        copy: bytes/s of a copy, reads and writes both counted.
        elementwise, launch: as in `models.planning.devices.Device`.
        link: bytes/s that an all-reduce over all processes sends and receives; None: a single process.
        right: whether the product was exactly what the host computed.
        fingerprint: of the product's result: equal on every device that works.
    """

    product: float
    bf16: float
    copy: float
    elementwise: float
    launch: float
    link: float | None
    right: bool
    fingerprint: str


def measure(here: torch.device, precision: str) -> Rates:
    """Measure this process's device, without drawing from any shared random generator.

    A collective: every process of the group calls it.

    Args:
        precision: that weights are held in.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    checked = _Product(here)
    bf16 = _seconds(lambda: checked.multiply(torch.bfloat16), here)
    product = _seconds(lambda: checked.multiply(dtype), here)
    found, expected = checked.seen_through()
    source = torch.ones(COPIED[here.type], device=here)
    target, narrow = torch.empty_like(source), source.to(dtype)
    copied, passed = _seconds(lambda: target.copy_(source), here), _seconds(lambda: F.silu(narrow), here)
    link, n = None, dist.get_world_size()
    if n > 1:  # a ring of n sends 2 (n - 1) / n of the buffer
        link = 2 * (n - 1) / n * target.nbytes / _seconds(lambda: dist.all_reduce(target), here)
    flops = 2 * SIDE[here.type] ** 3
    return Rates(
        product=flops / product,
        bf16=flops / bf16,
        copy=2 * source.nbytes / copied,
        elementwise=2 * narrow.nbytes / passed,
        launch=_seconds(lambda: _small_operations(here), here) / SMALL_OPERATIONS,
        link=link,
        right=torch.equal(found, expected),
        fingerprint=hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16],
    )


def device_facts(here: torch.device, precision: str, measured: Sequence[Rates]) -> Device | None:
    """The device as the planner knows it; None: a GPU that is not in its table.

    Args:
        precision: that weights are held in.
        measured: by every process; on a CPU the slowest one's rates count.
    """
    if here.type == "cuda":
        return gpu_facts(here)
    return cpu(
        {"bf16": min(rates.bf16 for rates in measured), precision: min(rates.product for rates in measured)},
        min(rates.copy for rates in measured),
        min((rates.link for rates in measured if rates.link), default=1e9),
        elementwise=min(rates.elementwise for rates in measured),
        launch=max(rates.launch for rates in measured),
    )


def gpu_facts(here: torch.device) -> Device | None:
    """A GPU's entry in the planner's table; None: it has none."""
    name = torch.cuda.get_device_name(here).lower()
    return next((device for key, device in DEVICES.items() if key in name), None)


class _Product:
    """A matrix product whose partial sums are all integers of at most `EXACT`.

    So every precision computes it exactly, in any order, and all devices agree bit for bit. The factors hold -1, 0 and
    1; those of a large product repeat a tile, so that the host can compute the result quickly.
    """

    def __init__(self, here: torch.device) -> None:
        self.side = SIDE[here.type]
        self.tiles = torch.stack(factors(self.side))
        repeat = self.side // TILE
        self._factors = [tile.repeat(repeat, repeat).to(here) for tile in self.tiles]
        self._cast: dict[torch.dtype, list[Tensor]] = {}
        self._result: Tensor | None = None

    def multiply(self, dtype: torch.dtype) -> None:
        a, b = self._cast.setdefault(dtype, [factor.to(dtype) for factor in self._factors])
        self._result = a @ b

    def seen_through(self) -> tuple[Tensor, Tensor]:
        """The last result times a vector of nonzero integers, and what that must be (Freivalds, 1977).

        A single wrong element always shows; several do unless they cancel out.
        """
        assert self._result is not None
        numbers = torch.randint(1, 1000, (self.side,), generator=torch.Generator().manual_seed(1)).double()
        found = (self._result.double() @ numbers.to(self._result.device)).cpu()
        repeat, (a, b) = self.side // TILE, self.tiles.double()
        expected = a @ (b @ numbers.view(repeat, TILE).sum(0)) * repeat
        return found, expected.repeat(repeat)


def factors(side: int) -> tuple[Tensor, Tensor]:
    """Tiles [TILE, TILE] of two matrices of `side` rows, sparse enough for the sums to stay small."""
    generator = torch.Generator().manual_seed(side)
    kept = torch.rand(2, TILE, TILE, generator=generator) < math.sqrt(120 / side)
    signs = torch.randint(0, 2, (2, TILE, TILE), generator=generator) * 2 - 1
    a, b = (signs * kept).float()
    return a, b


def _small_operations(here: torch.device) -> None:
    x = y = torch.ones(8, requires_grad=True, device=here)
    for _ in range(SMALL_OPERATIONS):
        y = y * x
    y.sum().backward()


def _seconds(work: Callable[[], object], here: torch.device) -> float:
    """Median of a few calls after one to warm up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if here.type == "cuda":
            torch.cuda.synchronize(here)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

"""What each process's device can do: measured in some 100 ms, its matrix product checked against the exact result."""

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
"""Of the multiplied matrices: large enough for the device's full rate."""
COPIED = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements that are copied."""
SMALL_OPERATIONS = 20
EXACT = 256
"""Every whole number up to here is one in each precision, bf16 too."""


@dataclass(frozen=True)
class Rates:
    """What one process measured, by the median of a few times.

    Attributes:
        product, bf16: FLOP/s of a matrix product in what weights are held in, and in bf16.
        copy: bytes/s of a copy, read and write counted.
        elementwise, launch: as of `models.planning.devices.Device`.
        link: bytes/s that an all-reduce over all processes sends and receives; None: a lone process.
        right: whether the product was exactly what it is by arithmetic on the host.
        fingerprint: of the product's result: equal on every device that is whole.
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
    """Measure this process's device; draws no number from a generator that others use.

    A collective: every process of the group calls it.

    Args:
        precision: what weights are held in.
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
        precision: what weights are held in.
        measured: by every process; on CPU the slowest one's rates count.
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
    """A GPU's line in the planner's table; None: it has none."""
    name = torch.cuda.get_device_name(here).lower()
    return next((device for key, device in DEVICES.items() if key in name), None)


class _Product:
    """A product whose every partial sum is a whole number of at most `EXACT`.

    So each precision computes it exactly and in any order, and all devices agree to the bit. The factors hold -1, 0 and
    1; those of a large product repeat those of a tile, so that the host can tell the result quickly.
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
        """The last result times a vector of whole numbers, none of them 0, and what it must be (Freivalds, 1977).

        One wrong element always shows, several do unless they cancel out.
        """
        assert self._result is not None
        numbers = torch.randint(1, 1000, (self.side,), generator=torch.Generator().manual_seed(1)).double()
        found = (self._result.double() @ numbers.to(self._result.device)).cpu()
        repeat, (a, b) = self.side // TILE, self.tiles.double()
        expected = a @ (b @ numbers.view(repeat, TILE).sum(0)) * repeat
        return found, expected.repeat(repeat)


def factors(side: int) -> tuple[Tensor, Tensor]:
    """Tiles [TILE, TILE] of two matrices of `side` rows, with so few ones that the sums stay small."""
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

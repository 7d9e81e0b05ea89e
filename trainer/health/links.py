"""The links between a run's processes: whether collectives are correct, each one's bandwidth, and clock offsets."""

import time
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

EXCHANGED = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Numbers, of 4 bytes each, that two processes send each other."""
PARTNERS = 4
"""Most machines that each machine exchanges with."""
Reading = tuple[float, float]
"""Unix seconds before and after a collective."""


def sums_are_right(here: torch.device) -> bool:
    """Whether an all-reduce and an all-gather of known numbers give the right results here. A collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pattern = torch.arange(1 << 16, device=here) % 7 + 1
    summed = (pattern * (rank % 8 + 1)).float()
    dist.all_reduce(summed)
    gathered = [torch.zeros_like(pattern) for _ in range(world)]
    dist.all_gather(gathered, pattern + rank)
    right = torch.equal(summed, (pattern * sum(other % 8 + 1 for other in range(world))).float())
    return right and all(torch.equal(each, pattern + other) for other, each in enumerate(gathered))


def rounds(machines: Sequence[Hashable], most: int = PARTNERS) -> list[list[tuple[int, int]]]:
    """Pairs of ranks that exchange at the same time, round by round; in a round, a machine has one partner.

    Ranks are paired with those of the same position within the partner machine; on a single machine, as if each rank
    had its own. With three machines or more, a slow link is slow with every partner, and a good one is fast with the
    other good ones.

    Args:
        machines: of each rank.
    """
    ranks: dict[Hashable, list[int]] = {}
    for rank, machine in enumerate(machines):
        ranks.setdefault(machine, []).append(rank)
    groups = list(ranks.values()) if len(ranks) > 1 else [[rank] for rank in range(len(machines))]
    if len(groups) < 2:
        return []
    groups += [[]] * (len(groups) % 2)
    last = len(groups) - 1
    found = []
    for turn in range(min(last, most)):  # a round-robin tournament, by the circle method
        partners = [(first, (turn - first) % last) for first in range(last)]
        pairs = [(a, last if a == b else b) for a, b in partners if a <= b]
        found.append([pair for a, b in pairs for pair in zip(groups[a], groups[b], strict=False)])
    return found


def exchange(machines: Sequence[Hashable], here: torch.device) -> tuple[float | None, list[int]]:
    """Exchange numbers with a few partners, both directions at once. A collective.

    Returns:
        Bytes/s each way with the fastest partner (None: there was none), and the partners whose numbers arrived wrong.
    """
    rank, wrong, rates = dist.get_rank(), [], []
    sent, received = (_numbers(rank, here) for _ in range(2))
    for pairs in rounds(machines):
        partner = next((sum(pair) - rank for pair in pairs if rank in pair), None)
        if partner is None:
            continue
        times = []
        for _ in range(3):  # the first one connects, and waits until the partner is here
            received.fill_(-1)
            start = time.perf_counter()
            swap = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
            for work in dist.batch_isend_irecv(swap):
                work.wait()
            received[-1].item()  # on a GPU only the device has waited
            times.append(time.perf_counter() - start)
        rates.append(sent.nbytes / min(times[1:]))
        if not torch.equal(received, _numbers(partner, here)):
            wrong.append(partner)
    return max(rates, default=None), wrong


def _numbers(rank: int, here: torch.device) -> Tensor:
    return torch.arange(EXCHANGED[here.type], dtype=torch.int32, device=here) + rank


def clock_readings(here: torch.device, times: int = 5) -> list[Reading]:
    """This process's clock before and after collectives, which no rank leaves before all have entered. A collective."""
    token, found = torch.zeros(1, device=here), []
    for _ in range(times + 1):
        before = time.time()
        dist.all_reduce(token)
        token.item()
        found.append((before, time.time()))
    return found[1:]


def clock_offset(mine: Sequence[Reading], chief: Sequence[Reading]) -> tuple[float, float]:
    """Seconds that a clock is ahead of rank 0's, and the largest error of that, from readings at the same collectives.

    Rank 0 entered before this process left, and left after this process entered: these differences bound the offset,
    as in a round trip of NTP (RFC 5905, section 8).
    """
    bounds = [
        (came - chief_left, left - chief_came)
        for (came, left), (chief_came, chief_left) in zip(mine, chief, strict=True)
    ]
    low, high = min(bounds, key=lambda bound: bound[1] - bound[0])
    return (low + high) / 2, (high - low) / 2

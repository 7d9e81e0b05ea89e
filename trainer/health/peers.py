"""Which machine is bad: a pure function of what every process of a run measured of itself. Without torch."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

SLOW = 0.5
"""Fraction of its peers' median below which a figure is reported."""
CLOCK = 1.0
"""Seconds that a clock may differ from rank 0's: the record's times come from several machines."""


class BadMachine(RuntimeError):
    """A machine that cannot train. Every rank of the attempt raises the same.

    Args:
        reason: for the user, with the names of the machines.
        hosts: machines to leave out; empty: something is wrong, but it cannot be told on which machine.
        ranks: of the processes there.
    """

    def __init__(self, reason: str, hosts: list[str], ranks: list[int]) -> None:
        super().__init__(reason, hosts, ranks)
        self.reason, self.hosts, self.ranks = reason, hosts, ranks

    def __str__(self) -> str:
        return self.reason


def no_folder(run_dir: Path, hosts: list[str], ranks: list[int]) -> BadMachine:
    return BadMachine(
        f"{run_dir} does not exist on {', '.join(hosts)}: run.root must be a folder that every machine can reach",
        hosts,
        ranks,
    )


@dataclass(frozen=True)
class Report:
    """What one process measured of its device, its machine and its links to the others. Rates are per second."""

    rank: int
    host: str
    address: str
    """Its address towards rank 0; together with the host's name it identifies the machine."""
    device: str
    """Its model; only devices of the same model are compared."""
    identity: str
    """The device's own UUID, if it has one."""
    product: float
    """FLOP/s."""
    copy: float
    """Bytes/s, reads and writes both counted."""
    right: bool
    """The matrix product's result was exact."""
    fingerprint: str
    """Of that result."""
    sums_right: bool
    """An all-reduce and an all-gather gave the right results."""
    link: float | None
    """Bytes/s each way with the fastest partner; None: there was none."""
    wrong_from: list[int]
    """Ranks whose numbers arrived wrong here."""
    sees_folder: bool
    """A file that rank 0 has just created in the run's folder is visible here."""
    write: float | None
    """Bytes/s into the run's folder, fsync included; None: not measured by this rank, or too little space was free."""
    free_disk: int | None
    disk_error: str
    disk_full: bool
    clock: tuple[float, float]
    """Seconds ahead of rank 0's, and the largest error of that."""
    free_memory: int
    """Bytes, of the device."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def machine(self) -> tuple[str, str]:
        return self.host, self.address


class Verdict(NamedTuple):
    """One problem of one machine.

    Attributes:
        kind: `broken`: it cannot train; `slow`: it can, but somebody should look at it.
        singled_out: False: something is wrong between machines, but it cannot be told which of them is the bad one.
    """

    kind: Literal["broken", "slow"]
    what: str
    reason: str
    host: str
    ranks: list[int]
    singled_out: bool = True


def judge(reports: Sequence[Report]) -> list[Verdict]:
    """All problems, the broken machines first.

    A figure is compared with the median of the other processes on devices of the same model (for a disk, of the other
    machines); with two, each is compared with the other. A slow link may be either end's fault, so it takes three to
    tell.

    Args:
        reports: of every rank, in order.
    """
    return [*_broken(reports), *_slow(reports)]


def _broken(reports: Sequence[Report]) -> Iterable[Verdict]:
    yield from _name(reports, [not r.right for r in reports], "product", "a matrix product gave a wrong result")
    for device in sorted({report.device for report in reports}):
        same = [report for report in reports if report.device == device and report.right]
        sure, odd = _odd([report.fingerprint for report in same])
        yield from _name(same, odd, "product", f"a matrix product differs from that of other {device}", sure)
    wrong = [not report.sums_right for report in reports]
    yield from _name(reports, wrong, "sums", "an all-reduce or all-gather gave a wrong result", not all(wrong))
    yield from _exchanges(reports)
    unseen = [not report.sees_folder for report in reports]
    yield from _name(reports, unseen, "folder", "the run's folder is not the same one as on rank 0")
    for error in sorted({report.disk_error for report in reports if report.disk_error}):
        failed = [report.disk_error == error for report in reports]
        yield from _name(reports, failed, "disk", f"the run's folder cannot be written: {error}")
    for name in ("torch", "deepspeed"):
        yield from _versions(reports, name, "broken")


def _slow(reports: Sequence[Report]) -> Iterable[Verdict]:
    yield from _versions(reports, "python", "slow")
    for device in sorted({report.device for report in reports}):
        same = [report for report in reports if report.device == device]
        yield from _behind(same, [r.product for r in same], "product", 1e9, "GFLOP/s of matrix products")
        yield from _behind(same, [r.copy for r in same], "copy", 1e9, "GB/s of copying")
        yield from _behind(same, [float(r.free_memory) for r in same], "memory", 1e9, "GB of free device memory")
    if len({report.machine for report in reports}) > 2 or len(reports) > 2:
        yield from _behind(reports, [report.link for report in reports], "link", 1e9, "GB/s to the fastest peer")
    yield from _behind(reports, [report.write for report in reports], "disk", 1e6, "MB/s into the run's folder")
    full = [report.disk_full for report in reports]
    yield from _name(reports, full, "full", "the disk of the run's folder is full", kind="slow")
    for report in _firsts(reports):
        ahead, error = report.clock
        if abs(ahead) - error > CLOCK:
            reason = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} rank 0's"
            yield Verdict("slow", "clock", reason, report.host, [report.rank])


def _firsts(reports: Sequence[Report]) -> list[Report]:
    """The first process of each machine."""
    return list({report.machine: report for report in reversed(reports)}.values())[::-1]


def _name(
    reports: Sequence[Report],
    bad: Sequence[bool],
    what: str,
    reason: str,
    sure: bool = True,
    kind: Literal["broken", "slow"] = "broken",
) -> Iterable[Verdict]:
    """One verdict for each machine with a bad process."""
    ranks: dict[Hashable, list[Report]] = {}
    for report, is_bad in zip(reports, bad, strict=True):
        if is_bad:
            ranks.setdefault(report.machine, []).append(report)
    for found in ranks.values():
        yield Verdict(kind, what, reason, found[0].host, [report.rank for report in found], sure)


def _odd(values: Sequence[str]) -> tuple[bool, list[bool]]:
    """(whether more than half have the same value, which ones differ from it); without such a majority, all differ."""
    most, count = next(iter(Counter(values).most_common(1)), ("", 0))
    sure = 2 * count > len(values)
    return sure, [value != most or not sure for value in values]


def _exchanges(reports: Sequence[Report]) -> Iterable[Verdict]:
    """The bad machine is the one with wrong exchanges with the most others; of two, it may be either."""
    machine_of = {report.rank: report.machine for report in reports}
    ends: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for partner in {machine_of[rank] for rank in report.wrong_from}:
            ends.update([report.machine, partner])
    worst = [machine for machine, count in ends.items() if count == max(ends.values())]
    bad = [report.machine in worst for report in reports]
    yield from _name(reports, bad, "link", "wrong numbers arrived over its link", sure=len(worst) == 1)


def _versions(reports: Sequence[Report], name: str, kind: Literal["broken", "slow"]) -> Iterable[Verdict]:
    """Processes whose version differs from that of the majority; without a majority, from rank 0's."""
    values = [report.versions.get(name, "unknown") for report in reports]
    sure, odd = _odd(values)
    usual = values[odd.index(False)] if sure else values[0]
    for value in sorted(set(values) - {usual}):
        others = [each == value for each in values]
        yield from _name(reports, others, "versions", f"it has {name} {value}, others have {usual}", kind=kind)


def _behind(
    reports: Sequence[Report], values: Sequence[float | None], what: str, unit: float, words: str
) -> Iterable[Verdict]:
    """Processes below `SLOW` of the median of the others that have a figure; for each machine the slowest is reported.

    Processes that share one machine's cores are not compared with each other: they differ by chance only.
    """
    have = [(value, report) for value, report in zip(values, reports, strict=True) if value is not None]
    found: dict[Hashable, list[tuple[float, Report, float]]] = {}
    for index, (value, report) in enumerate(have):
        rest = have[:index] + have[index + 1 :]
        others = [other for other, its in rest if its.identity or its.machine != report.machine]
        if others and value < SLOW * (usual := median(others)):
            found.setdefault(report.machine, []).append((value, report, usual))
    for slow in found.values():
        value, report, usual = min(slow, key=lambda item: item[0])
        reason = f"{value / unit:.3g} {words}, its peers' median is {usual / unit:.3g}"
        yield Verdict("slow", what, reason, report.host, [each.rank for _, each, _ in slow])

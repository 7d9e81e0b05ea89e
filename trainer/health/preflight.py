"""Before the first step, every process tests its device, links, disk and clock against its peers', to find bad ones."""

import contextlib
import errno
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from pydantic import TypeAdapter
from torch import distributed as dist

from configs import Config
from trainer.engine.private import VERSION
from trainer.files.own_files import no_link
from trainer.processes.collectives import from_all, from_chief
from trainer.processes.device import device
from trainer.record.lines import FULL, Record

from .links import clock_offset, clock_readings, exchange, sums_are_right
from .peers import BadMachine as BadMachine
from .peers import Report, Verdict, judge, no_folder
from .rates import Rates, measure

MARK = ".preflight-"
"""Prefix of the names of its files in the run's folder."""
WRITTEN = 4 << 20
"""Bytes that each machine writes there, at most a quarter of the free space."""
LITTLE = 1 << 20
"""Fewer bytes do not measure a disk's rate."""
PATIENCE = 5.0
"""Seconds to wait for a file that another machine created: NFS caches negative lookups."""

_TOLD = TypeAdapter(tuple[Report, Rates])
"""What the processes tell each other."""


def preflight(run_dir: Path, config: Config, record: Record | None) -> list[Rates]:
    """Measure, compare, and record the results as the event `preflight`. A collective.

    Returns:
        What each rank measured of its device.

    Raises:
        BadMachine: a machine is broken; one that is only slow is printed and recorded.
    """
    began, here, me = time.perf_counter(), device(), (socket.gethostname(), _address())
    machines = [tuple(each) for each in from_all(me)]
    mark = from_chief(lambda: _make_mark(run_dir))
    rates = measure(here, config.train.kept_in)
    right = dist.get_world_size() == 1 or sums_are_right(here)
    link, wrong_from = exchange(machines, here)
    disk = _try_disk(run_dir) if machines.index(me) == dist.get_rank() else _Disk()
    readings = clock_readings(here)
    report = Report(
        dist.get_rank(), *me, *_device(here), rates.product, rates.copy, rates.right, rates.fingerprint, right, link,
        wrong_from, mark is None or _appears(run_dir / mark), disk.rate, disk.free, disk.error, disk.full,
        clock_offset(readings, from_chief(lambda: readings)), _free_memory(here), _versions(),
    )  # fmt: skip
    told = [_TOLD.validate_python(each) for each in from_all([asdict(report), asdict(rates)])]
    reports, measured = [report for report, _ in told], [rates for _, rates in told]
    if record and mark:
        (run_dir / mark).unlink(missing_ok=True)
    if here.type == "cuda":
        torch.cuda.empty_cache()
    verdicts = judge(reports)
    if record:
        said = {kind: [_say(verdict) for verdict in verdicts if verdict.kind == kind] for kind in ("broken", "slow")}
        record.event("preflight", seconds=time.perf_counter() - began, **said, machines=figures(reports))
        for line in said["slow"]:
            print(f"preflight: {line}", file=sys.stderr)
    refuse([verdict for verdict in verdicts if verdict.kind == "broken"])
    return measured


def refuse(broken: Sequence[Verdict]) -> None:
    """Raise BadMachine if there are broken machines."""
    if broken:
        sure = [verdict for verdict in broken if verdict.singled_out]
        lines = [_say(verdict) for verdict in broken]
        reason = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
        hosts, ranks = {verdict.host for verdict in sure}, {rank for verdict in sure for rank in verdict.ranks}
        raise BadMachine(reason, sorted(hosts), sorted(ranks))


def require_folder(run_dir: Path) -> None:
    """Check that every process sees the run's folder, which rank 0 has created. A collective.

    Raises:
        BadMachine: some do not.
    """
    blind = [who for who in from_all((dist.get_rank(), socket.gethostname(), _appears(run_dir))) if not who[2]]
    if blind:
        hosts = sorted({host for _, host, _ in blind})
        raise no_folder(run_dir, hosts, [rank for rank, _, _ in blind])


def figures(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The event's figures for each machine, of its processes the lowest. Rates are per second; sizes are in bytes."""
    found: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        found.setdefault(report.machine, []).append(report)
    return [
        {
            "host": host,
            "address": address,
            "ranks": [report.rank for report in own],
            "devices": sorted({report.device for report in own}),
            "identities": [report.identity for report in own if report.identity],
            "flops": min(report.product for report in own),
            "copy": min(report.copy for report in own),
            "link": min((report.link for report in own if report.link), default=None),
            "write": own[0].write,
            "free_disk": own[0].free_disk,
            "free_memory": min(report.free_memory for report in own),
            "clock": own[0].clock,
            "versions": own[0].versions,
        }
        for (host, address), own in found.items()
    ]


def _say(verdict: Verdict) -> str:
    ranks = ", ".join(map(str, verdict.ranks[:8])) + (" ..." if len(verdict.ranks) > 8 else "")
    return f"{verdict.host} (rank {ranks}): {verdict.reason}"


def _address() -> str:
    """This machine's own address towards rank 0; no packet is sent to find it."""
    target = (os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "1")))
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _device(here: torch.device) -> tuple[str, str]:
    """(model, the device's UUID if it has one)."""
    if here.type == "cuda":
        facts = torch.cuda.get_device_properties(here)
        return facts.name, str(getattr(facts, "uuid", ""))
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads", ""


def _free_memory(here: torch.device) -> int:
    return torch.cuda.mem_get_info(here)[0] if here.type == "cuda" else psutil.virtual_memory().available


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": VERSION}


def _make_mark(run_dir: Path) -> str | None:
    """Create a file with a name that nobody can know yet; None: rank 0 itself cannot write there."""
    name = MARK + secrets.token_hex(8)
    with contextlib.suppress(OSError):
        for old in run_dir.glob(f"{MARK}*"):  # left by an attempt that was killed
            old.unlink(missing_ok=True)
        (run_dir / name).touch()
        return name
    return None


def _appears(path: Path) -> bool:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


class _Disk(NamedTuple):
    rate: float | None = None
    free: int | None = None
    error: str = ""
    full: bool = False


def _try_disk(run_dir: Path) -> _Disk:
    """Write a few MB to the run's folder, fsync, and read them back."""
    path = run_dir / f"{MARK}{socket.gethostname()}-{dist.get_rank()}"
    free = None
    try:
        free = shutil.disk_usage(run_dir).free
        data = os.urandom(min(WRITTEN, free // 4))
        start = time.perf_counter()
        with open(path, "wb", buffering=0, opener=no_link) as file:
            if file.write(data or b"0") < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
            if hasattr(os, "posix_fadvise"):  # read from the disk, not from the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if path.read_bytes() != (data or b"0"):
            return _Disk(None, free, "a file read back differs from what was written")
        return _Disk(len(data) / seconds if len(data) >= LITTLE else None, free)
    except OSError as error:
        if error.errno in FULL:
            return _Disk(None, free, full=True)
        return _Disk(None, free, f"{error.strerror or error}")
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

"""`muster doctor`: what is installed and reachable here, what would fail, and how to fix it."""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sqlite3
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import psutil
import typer
from rich.text import Text

from cluster.gangs import machine
from cluster.gangs.ray_folder import open_to_others
from cluster.gangs.session import check_reachable
from configs import ExitCode, counted, mask
from configs.units import byte_size
from trainer.record.terminal import Console
from trainer.tracking.start import SQLITE, sqlite_path, sqlite_uri

from .runs import RUNS, Json, Root

GB = 2**30
PACKAGES = ("torch", "deepspeed", "ray", "mlflow", "pyarrow", "numpy", "pydantic", "safetensors", "tokenizers")
OPTIONAL = ("transformers",)
STYLES = {"ok": "green", "note": "yellow", "fail": "red"}


class Finding(NamedTuple):
    """What one check found. `fail`: training would fail; `note`: it works, with limits."""

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    mend: str = ""


def doctor(
    root: Root = RUNS,
    as_json: Json = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster to reach; RAY_ADDRESS if not given.")] = None,
) -> None:
    """Check this machine, and say how to fix what would fail. Example: muster doctor"""
    findings = list(examine(root, address or os.environ.get("RAY_ADDRESS")))
    failed = [finding for finding in findings if finding.state == "fail"]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        console = Console(soft_wrap=True)
        for finding in findings:
            console.print(Text(f"{finding.state:<5}", style=STYLES[finding.state]), end="")
            console.print(Text(f"{finding.name:<14}{finding.found}"))
            if finding.mend:
                console.print(Text(f"{'':<19}{finding.mend}"))
    raise typer.Exit(ExitCode.FAILED if failed else ExitCode.FINISHED)


def examine(root: Path, address: str | None) -> Iterator[Finding]:
    """Run every check. One that raises is a finding itself."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("processors", _processors),
        ("memory", _memory),
        ("gpus", _gpus),
        ("compiler", _compiler),
        ("deepspeed", _stale_locks),
        ("shm", _shared_memory),
        ("files", _open_files),
        ("disk", lambda: _disk(root)),
        ("ray", lambda: _ray(address)),
        ("ray's folders", _ray_folders),
        ("tracking", lambda: _tracking(root)),
    ]
    for name, check in checks:
        try:
            for finding in check():
                yield finding._replace(found=mask(finding.found), mend=mask(finding.mend))
        except Exception as error:
            yield Finding(name, "fail", mask(f"{type(error).__name__}: {error}"))


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    for name in (*PACKAGES, *OPTIONAL):
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if name in OPTIONAL:
                yield Finding(name, "note", "not installed", "only tests and benchmarks need it")
            else:
                yield Finding(name, "fail", "not installed", f"pip install {name}, or install muster-train again")


def _processors() -> Iterator[Finding]:
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        line = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
        flags = set(line.partition(":")[2].split())
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]
    if fast:
        yield Finding("processors", "ok", f"{machine.cpus()}, bf16 in hardware ({', '.join(fast)})")
    else:
        yield Finding(
            "processors",
            "note",
            f"{machine.cpus()}, no bf16 in hardware",
            "on CPU, train.precision=fp32 is faster here",
        )


def _memory() -> Iterator[Finding]:
    total, free = machine.memory_bytes(), psutil.virtual_memory().available
    found = f"{byte_size(total)}, {byte_size(free)} free"
    if free < 2 * GB:
        yield Finding("memory", "note", found, "a worker takes 1 GB before it has a model: stop other programs")
    else:
        yield Finding("memory", "ok", found)


def _gpus() -> Iterator[Finding]:
    names = machine.gpus()
    driver = Path("/proc/driver/nvidia/version").exists()
    if names:
        yield Finding("gpus", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}")
    elif driver:
        yield Finding(
            "gpus", "fail", "an NVIDIA driver is loaded, but torch sees no GPU", "install torch built for CUDA"
        )
    else:
        yield Finding("gpus", "ok", "none: trains on the CPU")


def _compiler() -> Iterator[Finding]:
    compiler = next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )
    if compiler:
        yield Finding("compiler", "ok", compiler)
    else:
        yield Finding("compiler", "note", "none", "train.compile=true and optim.name=muon need a C++ compiler (g++)")


def _stale_locks() -> Iterator[Finding]:
    """A process killed while compiling an op of DeepSpeed leaves a lock that every later one waits for forever."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    building = {process.info["name"] for process in psutil.process_iter(["name"])} & {"ninja", "cc1plus", "nvcc"}
    if not locks:
        yield Finding("deepspeed ops", "ok", "no stale lock")
    elif building:
        yield Finding("deepspeed ops", "note", f"being compiled: {locks[0]}", "wait for it")
    else:
        remove = " ".join(str(lock) for lock in locks)
        yield Finding("deepspeed ops", "fail", f"locked by a process that is gone: {locks[0]}", f"rm {remove}")


def _shared_memory() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("/dev/shm", "note", "none", "Ray uses files in the temporary folder instead")
        return
    size = shutil.disk_usage(shm).total
    if size < 256 * 2**20:
        mend = "Ray then uses files; NCCL needs 1 GB or more: docker run --shm-size=2g"
        yield Finding("/dev/shm", "note", byte_size(size), mend)
    else:
        yield Finding("/dev/shm", "ok", byte_size(size))


def _open_files() -> Iterator[Finding]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 4096:
        yield Finding("open files", "note", f"at most {hard}", "Ray needs 4096: ulimit -n 8192")
    else:
        yield Finding("open files", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


def _disk(root: Path) -> Iterator[Finding]:
    for name, folder in (("runs", root), ("temporary", Path(tempfile.gettempdir()))):
        there = folder.resolve()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(name, "fail", f"{there} is not writable", "choose another folder with run.root or TMPDIR")
        elif free < GB:
            yield Finding(
                name, "fail", f"{byte_size(free)} free in {there}", "free 1 GB, or use another disk (run.root, TMPDIR)"
            )
        else:
            yield Finding(name, "ok", f"{byte_size(free)} free in {there}")


def _ray(address: str | None) -> Iterator[Finding]:
    if address is None:
        yield Finding("ray cluster", "ok", "none given: each run starts a private Ray on this machine")
        return
    try:
        check_reachable(address)
        yield Finding("ray cluster", "ok", f"{address} answers")
    except (OSError, ValueError) as error:
        mend = "start it with `muster cluster up`, or unset cluster.address and RAY_ADDRESS"
        yield Finding("ray cluster", "fail", f"{address} does not answer ({error})", mend)


def _ray_folders() -> Iterator[Finding]:
    """Session folders of every Ray on this machine: Ray runs code from them, so others must not be able to write."""
    folders = {
        Path(argument.partition("=")[2])
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet"
        for argument in process.info["cmdline"] or ()
        if argument.startswith("--session_dir=")
    }
    if exposed := sorted(folder for folder in folders if open_to_others(folder)):
        found = f"other users can write into {', '.join(map(str, exposed))}, and so run code as Ray's user"
        yield Finding("ray's folders", "note", found, "start Ray with `muster cluster up` and `muster cluster join`")
    else:
        yield Finding(
            "ray's folders", "ok", f"{counted(len(folders), 'session')} here, none that other users can write into"
        )


def _tracking(root: Path) -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(root.resolve() / "mlflow.db")
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3):
                yield Finding("mlflow", "ok", f"{uri} answers")
        except (urllib.error.URLError, OSError) as error:
            mend = "training goes on without it and `muster sync RUN` sends the record later"
            yield Finding("mlflow", "note", f"{uri} does not answer ({error})", mend)
    elif uri.startswith(SQLITE):
        path = sqlite_path(uri)
        if not path.exists():
            yield Finding("mlflow", "ok", f"{path} will be created by the first run")
            return
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as store:
            count = store.execute("select count(*) from runs").fetchone()[0]
        yield Finding("mlflow", "ok", f"{path}, {counted(count, 'run')}")
    else:
        mend = "set it to http(s)://server or sqlite:////path.db"
        yield Finding("mlflow", "fail", f"MLFLOW_TRACKING_URI={uri} is not a store that MLflow 3 can write to", mend)

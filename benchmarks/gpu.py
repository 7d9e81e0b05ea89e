"""All checks and measurements of muster on one GPU, in one go: is it right, is it fast, where does the time go.

Parts run within `--minutes`, the most important first, in processes of their own, so that one that fails or hangs does
not affect the others. Every result is written at once as a line of JSON to `--out` (results.jsonl); at the end they are
printed as tables. Checks share the device, measurements have it alone. Needs torch and DeepSpeed; Ray, MLflow, pyarrow,
transformers, torchao and Liger (`pip install ".[gpu]"`) are used if installed.

Run: `python benchmarks/gpu.py --minutes 8`; `--dry` runs everything in miniature on a CPU; `--only fast.dense layer`.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from on_gpu import Part, Row, Setting  # noqa: E402

MODULES = ("right", "fast", "layer", "around")
FIRST = (
    "right.compiled", "around.resume", "right.model", "right.experts", "right.precision",
    "fast.matmul", "fast.dense", "fast.moe", "fast.moe.small", "fast.big", "layer.main", "fast.transformers",
    "fast.trainer.moe",
    "fast.trainer.dense", "fast.profile.moe", "around.checkpoint", "around.start", "fast.bare", "fast.loss",
)  # fmt: skip
"""Parts that run first; the others follow module by module."""
PATIENCE, PATIENCE_ALONE = 2.0, 1.5
"""Multiples of its expected seconds after which a part is ended; the second is for parts that run alone and delay the
rest."""
LANES = 5
"""Processes that share the device for checks."""
START = 60.0
"""Seconds that a process takes to import everything and open the device."""


def seconds_allowed(part: Part, dry: bool) -> float:
    return part.seconds * (PATIENCE_ALONE if part.alone and not dry else PATIENCE)


def parts() -> list[Part]:
    """All parts, the most important first."""
    found = [part for name in MODULES for part in importlib.import_module(f"on_gpu.{name}").PARTS]
    by_name = {part.name: part for part in found}
    assert len(by_name) == len(found)
    return list(dict.fromkeys([*(by_name[name] for name in FIRST), *found]))


class Results:
    """Appends rows to results.jsonl, from any thread."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []  # type: ignore[var-annotated]
        self._lock = threading.Lock()
        path.write_text("")

    def add(self, row: Row) -> None:
        with self._lock, self.path.open("a") as file:
            self.rows.append(row)
            file.write(json.dumps(row) + "\n")
        kept = {key: value for key, value in row.items() if key not in ("part", "time")}
        print(f"[{row['time']:6.1f}] {row['part']}: {json.dumps(kept)[:400]}", flush=True)


class Lane:
    """Runs parts one after another in a process, which is restarted after a part that broke it."""

    def __init__(self, results: Results, out: Path, arguments: argparse.Namespace, began: float, until: float) -> None:
        self._results, self._out, self._arguments = results, out, arguments
        self._began, self._until = began, until

    def run(self, queue: Sequence[Part]) -> None:
        left = list(queue)
        while left:
            done = self._process(left)
            left = left[done:]

    def _process(self, queue: Sequence[Part]) -> int:
        """Run a process over parts until it ends or must be ended. Returns how many parts are done with."""
        if self._until - time.monotonic() < 5:
            for part in queue:
                self._tell(part.name, {"skipped": "no time left"})
            return len(queue)
        names = [part.name for part in queue]
        command = [sys.executable, __file__, "--worker", *names, "--out", str(self._out)]
        command += ["--dry"] * self._arguments.dry
        log = (self._out / f"{names[0]}.log").open("wb")
        # By default each process would start as many compilers as there are cores.
        environment = os.environ | ({} if queue[0].alone else {"TORCHINDUCTOR_COMPILE_THREADS": "4"})
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, env=environment
        )
        state: dict[str, Any] = {"at": 0, "since": time.monotonic(), "grace": START}
        reader = threading.Thread(target=self._read, args=(process, queue, state), daemon=True)
        reader.start()
        reason = ""
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            part = queue[min(state["at"], len(queue) - 1)]
            allowed = state["grace"] + seconds_allowed(part, self._arguments.dry)
            if now > self._until:
                reason = "no time left"
            elif now - state["since"] > allowed:
                reason = f"took more than {allowed:.0f} s"
            if reason:
                end(process)
                break
        process.wait()
        reader.join(10)
        log.close()
        if state["at"] >= len(queue):
            return len(queue)
        tail = Path(log.name).read_text(errors="replace")[-1500:]
        why = {"skipped": reason} if reason == "no time left" else {"failed": reason or f"exit {process.returncode}"}
        self._tell(queue[state["at"]].name, why | ({"log": tail} if "failed" in why else {}))
        return state["at"] + 1

    def _read(self, process: subprocess.Popen, queue: Sequence[Part], state: dict[str, Any]) -> None:
        assert process.stdout
        for line in process.stdout:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a library's own words
            state["since"], state["grace"] = time.monotonic(), 0.0
            if "done" in row:
                state["at"] += 1
                self._tell(row["done"], {"seconds": row["seconds"]})
            else:
                self._tell(row.pop("part"), row)

    def _tell(self, part: str, row: Row) -> None:
        self._results.add({"part": part, "time": round(time.monotonic() - self._began, 1)} | row)


def end(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, which would otherwise keep using the device."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()


def worker(names: Sequence[str], out: Path, dry: bool) -> None:
    """Run parts in this process; rows go to standard output, and everything else that is printed to standard error."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    device = "cuda" if torch.cuda.is_available() and not dry else "cpu"
    by_name = {part.name: part for part in parts()}
    for name in names:
        part, start = by_name[name], time.monotonic()
        if device == "cuda" and not part.alone:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // LANES))
        folder = out / "work" / name
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir(parents=True)
        setting = Setting(device, dry, folder, 0.8 * seconds_allowed(part, dry))
        try:
            for row in part.run(setting):
                print(json.dumps({"part": name} | row, default=_plain), file=told, flush=True)
        except Exception as error:
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            row = {"failed": f"{type(error).__name__}: {str(error)[:600]}", "at": f"{where.filename}:{where.lineno}"}
            print(json.dumps({"part": name} | row), file=told, flush=True)
            if device == "cuda" and _broken(torch):
                told.close()
                os._exit(3)  # the device is unusable in this process from now on
        seconds = round(time.monotonic() - start, 1)
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(json.dumps({"done": name, "seconds": seconds}), file=told, flush=True)
    told.close()
    os._exit(0)  # do not wait for process groups and background threads of what was measured


def _broken(torch: Any) -> bool:
    try:
        torch.cuda.synchronize()
        return False
    except Exception:
        return True


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def surroundings() -> Row:
    """The machine and the versions."""
    import torch

    found: Row = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    for name in ("torch", "triton", "deepspeed", "transformers", "torchao", "liger-kernel", "pyarrow", "ray", "mlflow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        asked = "driver_version,clocks.sm,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
            found["driver, clocks, power"] = said.strip()
    return found


def chosen(everything: Sequence[Part], only: Sequence[str] | None, without: Sequence[str]) -> list[Part]:
    """Parts whose name is in `only`, or starts with such a name and a dot, in the order of `only`."""

    def named(part: Part, names: Iterable[str]) -> bool:
        return any(part.name == name or part.name.startswith(f"{name}.") for name in names)

    ordered = [part for name in only for part in everything if named(part, [name])] if only else everything
    return [part for part in dict.fromkeys(ordered) if not named(part, without)]


def lanes(checks: Sequence[Part], count: int) -> list[list[Part]]:
    """Checks distributed over lanes of about equal length, in order."""
    spread: list[list[Part]] = [[] for _ in range(count)]
    for part in checks:
        min(spread, key=lambda lane: sum(p.seconds for p in lane)).append(part)
    return [lane for lane in spread if lane]


def table(rows: Sequence[Row]) -> str:
    """Rows of one part as a Markdown table; columns in order of first appearance."""
    rows = [{key: value for key, value in row.items() if key not in ("part", "time", "seconds")} for row in rows]
    rows = [row for row in rows if row and not any(isinstance(value, list | dict) for value in row.values())]
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return "" if value is None else str(value).replace("\n", " ").replace("|", "/")[:160]

    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of the whole run")
    parser.add_argument("--dry", action="store_true", help="everything in miniature, on the CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts, or sections: " + ", ".join(MODULES))
    parser.add_argument("--without", nargs="+", default=[], metavar="PART", help="parts or sections to leave out")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results.jsonl and the logs")
    parser.add_argument("--list", action="store_true", help="list the parts and the seconds that each should take")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.out, args.dry)
    began = time.monotonic()
    if args.dry:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    mine = chosen(parts(), args.only, args.without)
    if args.list:
        for part in mine:
            print(f"{part.name:32} {part.seconds:5.0f} s  {'alone' if part.alone else 'beside others'}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    results.add({"part": "surroundings", "time": 0.0} | surroundings())
    until = began + 60 * args.minutes - 2
    checks, measured = [part for part in mine if not part.alone], [part for part in mine if part.alone]
    share = 0.35 if measured and not args.dry else 1.0  # fraction of the time for checks; the rest is for measurements
    over = began + (until - began) * share
    threads = []
    for lane in lanes(checks, 1 if args.dry else LANES):
        runner = Lane(results, args.out, args, began, over)
        threads.append(threading.Thread(target=runner.run, args=(lane,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    Lane(results, args.out, args, began, until).run(measured)
    names = dict.fromkeys(row["part"] for row in results.rows)
    text = "\n\n".join(f"## {n}\n\n{t}" for n in names if (t := table([r for r in results.rows if r["part"] == n])))
    (args.out / "tables.md").write_text(text + "\n")
    print("\n" + text)
    bad = [row for row in results.rows if row.get("ok") is False or "failed" in row]
    print(f"\n{len(results.rows)} results, {sum('ok' in row for row in results.rows)} checks, {len(bad)} bad:")
    for row in bad:
        print(f"  {row['part']}: {row.get('check', '')} {row.get('failed', '')}"[:300])
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

"""How long `muster runs` takes over many runs, and `muster status` over a run of a million steps.

Run: `python benchmarks/records.py FOLDER [--before CHECKOUT]`. FOLDER is created: folders of runs in the format that
training writes, with made-up numbers. CHECKOUT is another version of this repository, whose commands are timed in turn
with this one's on the same folders. Seconds are those of the whole command, Python's start included: wall-clock time,
and CPU time, which says more on a shared machine.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGAN = 1.79e9
KEPT = (".summaries.json", "metrics.parquet")
"""Files that this version keeps beside the records."""


def write_run(run_dir: Path, steps: int, every: int) -> None:
    """A finished run with a checkpoint and an evaluation every so many steps, and an attempt that was killed."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"run: {{name: {run_dir.name}}}\n")
    attempt, now = 1, BEGAN
    with (run_dir / "metrics.jsonl").open("w") as metrics, (run_dir / "events.jsonl").open("w") as events:

        def event(name: str, **details: object) -> None:
            events.write(json.dumps({"time": now, "attempt": attempt, "event": name, **details}) + "\n")

        def start() -> None:
            profile = {f"field_{number}": number for number in range(20)}
            item = {"name": "text", "kind": "training", "source": "/data/text", "digest": "ab" * 32, "profile": profile}
            where = {"pid": 2**22 - 1, "host": os.uname().nodename}
            event(
                "attempt_started", world_size=8, device="cuda:0", versions={"torch": "2.13"}, inputs=[item] * 2, **where
            )
            machine = {"host": "host-0", "flops": 6e14, "copy": 4e12, "link": 2e10, "versions": {"torch": "2.13"}}
            event("preflight", broken=[], slow=[], seconds=3.1, machines=[machine] * 8)

        event("resolved", derived=["parallel.dp=8: what is left"] * 8, began=now, command="muster train moe")
        start()
        step, killed = 0, False
        while step < steps:
            step, now = step + 1, now + 0.5
            told = {
                "step": step,
                "attempt": attempt,
                "time": now,
                "loss": 3 + 1 / step,
                "lr": 3e-4,
                "grad_norm": 0.5 + 1 / step,
            }
            told |= {"tokens": step * 65536, "sequences": step * 32, "tokens_per_second": 131072.125 + 1 / step}
            told |= {
                "tflops": 312.4217 + 1 / step,
                "memory_gb": 61.3344,
                "data_wait": 0.0012345,
                "step_time": 0.4912345,
                "mfu": 0.4,
            }
            metrics.write(json.dumps(told) + "\n")
            if step % every == 0:
                metrics.write(
                    json.dumps({"step": step, "attempt": attempt, "time": now, "eval_loss": 2 + 1 / step}) + "\n"
                )
                event("evaluation", step=step, eval_loss=2 + 1 / step, eval_tokens=65536, seconds=0.25)
                event("checkpoint", step=step, bytes=10**10, stall_s=0.2, write_s=9.5, pruned=[])
            if step == steps // 2 and not killed:
                killed = True
                event(
                    "worker_lost", rank=3, kind="infrastructure", step=step, reason="the process is gone", traceback=""
                )
                event("policy", action="retry", reason="1 infrastructure failure", failures=1)
                step, now, attempt = step - step % every, now + 30, 2
                start()
        event("attempt_ended", status="FINISHED", reason="reached train.steps", step=steps)


def seconds(checkout: Path, command: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a command."""
    code = "import sys; from cluster.cli import main; sys.argv[0] = 'muster'; main()"
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, "-P", "-c", code, *command], env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    many, long = args.folder / "many", args.folder / "long"
    if not args.folder.exists():
        for number in range(args.runs):
            write_run(many / f"run-{number:05d}", steps=300, every=20)
        write_run(long / "run", args.steps, every=1000)
        (args.folder / "none").mkdir()
    commands = {
        "`muster runs`, no run": ["runs", "--root", str(args.folder / "none")],
        f"`muster runs`, {args.runs:,} runs": ["runs", "--root", str(many)],
        f"`muster status`, {args.steps:,} steps": ["status", "run", "--root", str(long)],
    }
    print("| command | version | first | then (median) | processor, first | then |\n|---|---|---|---|---|---|")
    for label, command in commands.items():
        for path in (path for kept in KEPT for path in args.folder.rglob(kept)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        checkouts = {"before": args.before.resolve()} if args.before else {}
        checkouts["this"] = ROOT
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
        for _ in range(1 + args.times):
            for name, checkout in checkouts.items():
                taken[name].append(seconds(checkout, command))
        for name, ((wall, cpu), *others) in taken.items():
            then = [statistics.median(values) for values in zip(*others, strict=True)]
            print(f"| {label} | {name} | {wall:.2f} s | {then[0]:.2f} s | {cpu:.2f} s | {then[1]:.2f} s |", flush=True)
    if shutil.which("nproc"):
        print(f"load when it ended: {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()

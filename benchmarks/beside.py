"""Step times of this checkout and of an earlier commit, in turn: `python benchmarks/beside.py COMMIT [--turns 9]`.

Each turn trains the quickstart for a few steps without Ray, from a worktree of the commit and from here, in
alternating order. The result is the median over turns of the ratio of their median steps (above 1: this checkout is
faster). On some machines a process is slow from its first step to its last, whichever code it runs (0.26 s or 0.31 s a
step on the one in RESULTS.md): the fastest turns are compared, too, and five turns are too few. The losses must be
equal to the last bit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEYS = ["tracking.enabled=false", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=0", "optim.warmup=1"]
WARM = 3
"""Warm-up steps, which do not count."""


def measure(code: Path, folder: Path, name: str, data: str, steps: int, precision: str) -> tuple[float, list[float]]:
    """(median seconds of a step, losses) of one training by the code in a folder."""
    command = [sys.executable, "-P", "-m", "trainer", "quickstart", f"run.name={name}", f"run.root={folder}",
               f"data.path={data}", f"train.steps={steps}", f"train.precision={precision}", *KEYS]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(code)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{code}: {' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    return statistics.median(line["step_time"] for line in lines[WARM:]), [line["loss"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--data", required=True, help="prepared folder")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=15)
    given = parser.parse_args()
    data = str(Path(given.data).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder, before = Path(temporary), Path(temporary) / "before"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", before, given.commit], cwd=ROOT, check=True)
        try:
            for precision in ("fp32", "bf16"):
                ratios, times = [], {before: [], ROOT: []}
                for turn in range(given.turns):
                    found = {}
                    for code in (before, ROOT) if turn % 2 else (ROOT, before):
                        name = f"{precision}-{turn}-{code.name}"
                        found[code] = measure(code, folder, name, data, given.steps, precision)
                    (old, losses), (new, same) = found[before], found[ROOT]
                    assert losses == same, "the losses differ"
                    times[before].append(old)
                    times[ROOT].append(new)
                    ratios.append(old / new)
                    print(f"{precision} turn {turn}: {old:.3f} s before, {new:.3f} s now, {old / new:.3f}", flush=True)
                fastest = min(times[before]) / min(times[ROOT])
                print(f"{precision}: median of ratios {statistics.median(ratios):.3f}, of the fastest {fastest:.3f}, "
                      "losses equal", flush=True)  # fmt: skip
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()

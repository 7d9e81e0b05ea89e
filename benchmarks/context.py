"""The longest sequence that fits in a given memory, and what attention to a part of the keys costs.

Every measurement is a process of its own (or `sp` of them): resident memory at its highest during the forward and
backward pass of one sequence, less what stood before it (libraries, weights, gradients). glibc is told to give back
what is freed, so that the peak is what was needed. Run: `python benchmarks/context.py [--memory GB]` (CPU).
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MODEL: dict[str, Any] = {
    "num_layers": 8, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 1024, "loss_chunk": 512,
    "intermediate_size": 704, "max_positions": 2**20,
}  # fmt: skip
UNIT = 64
"""Lengths are multiples of it."""
CONTEXTS: dict[str, dict[str, Any]] = {
    "no checkpointing": {"every": 0},
    "selective, every 2nd layer": {"every": 2},
    "full": {"every": 1},
    "no checkpointing, sp=2": {"every": 0, "sp": 2},
    "full, sp=2": {"every": 1, "sp": 2},
    "full, sp=4": {"every": 1, "sp": 4},
}
PATTERNS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding_window=256": {"sliding_window": 256},
    "block_sparse": {"block_sparse": {}},
    "block_sparse, stride 16": {"block_sparse": {"stride": 16}},
    "block_sparse by a dense mask": {"block_sparse": {}, "dense": True},
}
LONGEST_DENSE = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=float, default=0.15, help="GB that a process may grow by")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536], help="for the patterns")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trial:
        print(json.dumps(measure(**json.loads(arguments.trial))), flush=True)
        return
    print(f"Longest sequence within {arguments.memory} GB a process\n")
    print("| | tokens | x | GB | CPU s per 1,000 tokens, all processes |\n|---|---|---|---|---|")
    shortest = None
    for name, settings in CONTEXTS.items():
        length, seen = longest(partial(trial, kind="model", **settings), arguments.memory)
        shortest = shortest or length
        seconds = seen["seconds"] / max(length, 1) * 1000
        print(f"| {name} | {length} | {length / shortest:.1f} | {seen['gb']:.3f} | {seconds:.2f} |", flush=True)
    print("\nForward and backward pass of one attention, 8 heads of 32, 4 for keys\n")
    print("| | tokens | keys a query sees | CPU s | x full | GB |\n|---|---|---|---|---|---|")
    for length in arguments.lengths:
        full = 0.0
        for name, settings in PATTERNS.items():
            if settings.get("dense") and length > LONGEST_DENSE:
                continue
            seen = trial(kind="attention", length=length, **settings)
            full = full or seen["seconds"]
            cost = f"{seen['seconds']:.2f} | {seen['seconds'] / full:.3f} | {seen['gb']:.3f}"
            print(f"| {name} | {length} | {seen['keys']:.0f} | {cost} |", flush=True)


def longest(attempt: Callable[..., dict[str, Any]], memory: float) -> tuple[int, dict[str, Any]]:
    """The longest multiple of UNIT that fits, to within 3%, and its measurement. Memory is nearly linear in it."""
    known: dict[int, dict[str, Any]] = {}
    guess = 16 * UNIT
    while True:
        known[guess] = attempt(length=guess)
        fits = max((length for length in known if known[length]["gb"] <= memory), default=0)
        too_long = min((length for length in known if known[length]["gb"] > memory), default=2 * guess)
        step = max(1, fits // 32 // UNIT) * UNIT
        if too_long in known and too_long - fits <= step:
            return fits, known.get(fits, {"gb": 0.0, "seconds": 0.0})
        guess = (fits + too_long) // 2 // UNIT * UNIT
        if len(known) == 1:
            continue
        (low, less), (high, more) = sorted((n, known[n]["gb"]) for n in sorted(known, key=lambda n: abs(n - fits))[:2])
        target = int(low + (memory - less) * (high - low) / (more - less)) // UNIT * UNIT
        guess = max(fits + step, target)
        if too_long in known:
            guess = min(guess, too_long - UNIT)


def trial(sp: int = 1, **settings: Any) -> dict[str, Any]:
    """Run `measure` in processes of its own: the most memory of any, the time of all."""
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(sp):
            text = json.dumps(settings | {"rank": rank, "sp": sp, "store": f"{folder}/store"})
            command = [sys.executable, __file__, "--trial", text]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
        results = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    return {
        "gb": max(r["gb"] for r in results),
        "seconds": sum(r["seconds"] for r in results),
        "keys": results[0]["keys"],
    }


def measure(kind: str, length: int, rank: int, sp: int, store: str, **settings: Any) -> dict[str, float]:
    """GB grown by and CPU seconds of one forward and backward pass."""
    import torch

    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: a fixed one
    if kind == "model":
        step, keys = _model(settings["every"], rank, sp, store), (length + 1) / 2
    else:
        step, keys = _attention(settings, length)
    step(128 * sp)  # allocates gradients and what libraries keep
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
    before, start = _status("VmRSS"), time.process_time()
    step(length)
    return {"gb": (_status("VmHWM") - before) / 1e9, "seconds": time.process_time() - start, "keys": keys}


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _model(every: int, rank: int, sp: int, store: str) -> Callable[[int], None]:
    import torch

    from configs import ModelConfig
    from models.batch import Batch
    from models.families import build

    module = build(ModelConfig(**MODEL))
    module.init_weights(0)
    module.set_activation_checkpointing(every)  # type: ignore[operator]
    if sp > 1:
        from torch import distributed as dist

        from trainer.engine import start_processes
        from trainer.ulysses import share_sequences

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sp)
        start_processes(60)
        assert dist.group.WORLD
        share_sequences(module, dist.group.WORLD)

    def step(length: int) -> None:
        place = torch.arange(length)[None]
        ids = place % MODEL["vocab_size"]
        batch = Batch(ids, ids, place, None, torch.zeros(1, dtype=torch.long))
        if sp > 1:
            from trainer.ulysses import split

            batch = split(batch, rank, sp)
        module(batch).loss_sum.backward()

    return step


def _attention(settings: dict[str, Any], length: int) -> tuple[Callable[[int], None], float]:
    import torch

    from configs import ModelConfig
    from models import attention
    from models.pattern import Pattern

    if settings.pop("dense", False):
        attention.LONGEST_MASK = 2**31
    pattern = Pattern.of(ModelConfig(**settings))

    def step(length: int) -> None:
        q, k, v = (torch.randn(1, length, heads, 32, requires_grad=True) for heads in (8, 4, 4))
        y = attention.attend(q, k, v, attention.visibility(length, None, pattern, q))
        y.backward(torch.ones_like(y))

    return step, pattern.keys_per_query(length)


if __name__ == "__main__":
    main()

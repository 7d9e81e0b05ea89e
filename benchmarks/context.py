"""The longest sequence that fits in a given memory, and the cost of attention to a part of the keys.

Every row has a process of its own (or `sp` of them), which measures the peak resident memory during the forward and
backward pass of one sequence, minus what was resident before (libraries, weights, gradients). glibc is told to return
freed memory at once, so that the peak is what was needed. The search starts at the planner's estimate.
Run: `python benchmarks/context.py [--memory GB]` (CPU, some 10 minutes).
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MODEL: dict[str, Any] = {
    "num_layers": 8, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 1024, "loss_chunk": 512,
    "intermediate_size": 704, "max_positions": 2**20,
}  # fmt: skip
UNIT = 64
"""Lengths are multiples of this."""
CLOSE, TRIALS = 0.97, 6
"""Fraction of the memory from which a length counts as the longest, and the number of measurements that end the search.
"""
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
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[4096, 16384, 65536], help="lengths for the attention patterns"
    )
    parser.add_argument("--rows", nargs="*", default=list(CONTEXTS), help="only these of the first table")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(**json.loads(arguments.serve))
        return
    print(f"Longest sequence within {arguments.memory} GB a process\n")
    print("| | tokens | x | GB | CPU s per 1,000 tokens, all processes |\n|---|---|---|---|---|")
    shortest = None
    for name in arguments.rows:
        settings = CONTEXTS[name]
        with Workers(kind="model", **settings) as workers:
            length, seen = longest(workers, estimate(**settings, memory=arguments.memory), arguments.memory)
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
            with Workers(kind="attention", **settings) as workers:
                seen = workers(length)
            full = full or seen["seconds"]
            cost = f"{seen['seconds']:.2f} | {seen['seconds'] / full:.3f} | {seen['gb']:.3f}"
            print(f"| {name} | {length} | {seen['keys']:.0f} | {cost} |", flush=True)


def estimate(memory: float, every: int, sp: int = 1) -> int:
    """The longest sequence by the planner."""
    from configs import Config, from_dict, resolve
    from models.planning.memory import memory as planned

    def config(length: int) -> Config:
        kind = "full" if every == 1 else "selective" if every else "none"
        train = {"seq_len": length, "global_batch": 1, "micro_batch": 1, "precision": "fp32",
                 "activation_checkpointing": kind, "checkpoint_every_layers": max(every, 1)}  # fmt: skip
        settings = resolve(from_dict({"model": MODEL, "train": train}))[0]
        return settings.model_copy(update={"parallel": settings.parallel.model_copy(update={"sp": sp})})

    def grows(length: int) -> float:
        held = planned(config(length), cpu=True)
        return (held.needed - held.weights - held.optimizer - held.runtime) / 1e9

    length = UNIT * sp
    while grows(2 * length) <= memory:
        length *= 2
    return int(length * memory / grows(length)) // UNIT * UNIT


def longest(attempt: Callable[[int], dict[str, float]], guess: int, memory: float) -> tuple[int, dict[str, float]]:
    """The longest multiple of UNIT that fits, by CLOSE, and its measurement. Memory is nearly linear in it."""
    known: dict[int, dict[str, float]] = {}
    for _ in range(TRIALS):
        known[guess] = attempt(guess)
        if CLOSE * memory <= known[guess]["gb"] <= memory:
            break
        fits = max((length for length in known if known[length]["gb"] <= memory), default=0)
        too_long = min((length for length in known if known[length]["gb"] > memory), default=2 * guess + 2 * UNIT)
        if too_long - fits <= UNIT:
            break
        target = int(guess * memory * (1 + CLOSE) / 2 / known[guess]["gb"]) // UNIT * UNIT
        guess = min(max(target, fits + UNIT), too_long - UNIT)
    fits = max((length for length in known if known[length]["gb"] <= memory), default=0)
    return fits, known.get(fits, {"gb": 0.0, "seconds": 0.0})


class Workers:
    """`sp` processes that measure one length after another: the maximum of their memory, the sum of their time."""

    def __init__(self, sp: int = 1, **settings: Any):
        self._folder = tempfile.TemporaryDirectory()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._processes = []
        for rank in range(sp):
            text = json.dumps(settings | {"rank": rank, "sp": sp, "store": f"{self._folder.name}/store"})
            command = [sys.executable, __file__, "--serve", text]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
            )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.stdin.close()  # type: ignore[union-attr]
        for process in self._processes:
            process.wait(60)
        self._folder.cleanup()

    def __call__(self, length: int) -> dict[str, float]:
        for process in self._processes:
            print(length, file=process.stdin, flush=True)
        lines = (process.stdout.readline() for process in self._processes)  # type: ignore[union-attr]
        results = [json.loads(line) for line in lines]
        return {
            "gb": max(r["gb"] for r in results),
            "seconds": sum(r["seconds"] for r in results),
            "keys": results[0]["keys"],
        }


def serve(kind: str, rank: int, sp: int, store: str, **settings: Any) -> None:
    """Answer each length on standard input with the growth in GB and the CPU seconds of a forward and backward pass."""
    import torch

    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if kind == "model":
        step, keys = _model(settings["every"], rank, sp, store), lambda length: (length + 1) / 2
    else:
        step, keys = _attention(settings)
    libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: fixed, even if the process group has set another
    libc.mallopt(-1, 1 << 17)  # M_TRIM_THRESHOLD
    step(128 * sp)  # allocates gradients and the libraries' buffers
    for line in sys.stdin:
        length = int(line)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
        before, start = _status("VmRSS"), time.process_time()
        step(length)
        seconds = time.process_time() - start
        print(
            json.dumps({"gb": (_status("VmHWM") - before) / 1e9, "seconds": seconds, "keys": keys(length)}), flush=True
        )


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

        from trainer.engine.start import start_processes
        from trainer.engine.ulysses import share_sequences

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sp)
        start_processes(60)
        assert dist.group.WORLD
        share_sequences(module, dist.group.WORLD)

    def step(length: int) -> None:
        place = torch.arange(length)[None]
        ids = place % MODEL["vocab_size"]
        batch = Batch(ids, ids, place, None, torch.zeros(1, dtype=torch.long))
        if sp > 1:
            from trainer.engine.ulysses import split

            batch = split(batch, rank, sp)
        module(batch).loss_sum.backward()

    return step


def _attention(settings: dict[str, Any]) -> tuple[Callable[[int], None], Callable[[int], float]]:
    import torch

    from configs import ModelConfig
    from models.decoder import attention
    from models.decoder.pattern import Pattern

    if settings.pop("dense", False):
        attention.LONGEST_MASK = 2**31
    pattern = Pattern.of(ModelConfig(**settings))

    def step(length: int) -> None:
        q, k, v = (torch.randn(1, length, heads, 32, requires_grad=True) for heads in (8, 4, 4))
        y = attention.attend(q, k, v, attention.visibility(length, None, pattern, q))
        y.backward(torch.ones_like(y))

    return step, pattern.keys_per_query


if __name__ == "__main__":
    main()

"""The planner's predictions beside measurements: memory of states, total memory, and time of a step.

Every config is trained for a few steps by the trainer's own engine and step, in processes of its own. States are the
sum of the tensor storages that the engine holds just before the optimizer steps; the total is the process's peak
resident memory minus that before the model was built, with freed memory returned at once. Then as many steps are timed
with freed memory kept, as the trainer does. `--keep` keeps it from the start: the total then includes the fragmentation
of glibc's heap. `--runs`: whole runs of the trainer instead, data, evaluation and checkpoints included, measured from
their records. Run: `python benchmarks/planner.py [NAME ...]`.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

DENSE = {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 8192,
         "intermediate_size": 1536}  # fmt: skip
MOE = {"num_layers": 4, "hidden_size": 384, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 8192, "num_experts": 16,
       "expert_size": 384, "top_k": 2}  # fmt: skip
WIDE = {"num_layers": 2, "hidden_size": 1024, "num_heads": 8, "vocab_size": 16384, "intermediate_size": 2816}

RUNS: dict[str, dict[str, Any]] = {
    "dense fp32": {"model": DENSE},
    "dense fp32, adamw, 2 micro-batches": {"model": DENSE, "train": {"micro_batch": 2}},
    "dense fp32, sgd": {"model": DENSE, "optim": {"name": "sgd"}},
    "dense fp32, checkpointing": {"model": DENSE, "train": {"global_batch": 16, "activation_checkpointing": "full"}},
    "dense fp32, every second layer": {
        "model": DENSE, "train": {"global_batch": 8, "activation_checkpointing": "selective"},
    },
    "dense bf16": {"model": DENSE, "train": {"precision": "bf16", "global_batch": 8}},
    "dense bf16, ZeRO-1": {"model": DENSE, "train": {"precision": "bf16"}, "parallel": {"zero_stage": 1}},
    "dense fp32, 2 processes": {"model": DENSE, "parallel": {"dp": 2}},
    "dense fp32, ZeRO-1, 2 processes": {"model": DENSE, "parallel": {"dp": 2, "zero_stage": 1}},
    "dense fp32, ZeRO-2, 2 processes": {"model": DENSE, "parallel": {"dp": 2, "zero_stage": 2}},
    "dense bf16, ZeRO-2, 2 processes": {
        "model": DENSE, "train": {"precision": "bf16", "global_batch": 8}, "parallel": {"dp": 2, "zero_stage": 2},
    },
    "dense fp32, ZeRO-3, 2 processes": {"model": DENSE, "parallel": {"dp": 2, "zero_stage": 3}},
    "dense bf16, ZeRO-3, 2 processes": {
        "model": DENSE, "train": {"precision": "bf16", "global_batch": 8}, "parallel": {"dp": 2, "zero_stage": 3},
    },
    "moe fp32": {"model": MOE},
    "moe bf16, ZeRO-1": {"model": MOE, "train": {"precision": "bf16"}, "parallel": {"zero_stage": 1}},
    "moe bf16, ZeRO-1, 2 processes": {
        "model": MOE, "train": {"precision": "bf16"}, "parallel": {"dp": 2, "zero_stage": 1},
    },
    "moe fp32, ZeRO-3, checkpointing, 2 processes": {
        "model": MOE, "train": {"global_batch": 8, "activation_checkpointing": "full"},
        "parallel": {"dp": 2, "zero_stage": 3},
    },
    "moe fp32, muon": {"model": MOE, "optim": {"name": "muon"}},
    "wide fp32, 1,024 tokens": {"model": WIDE, "train": {"global_batch": 1, "seq_len": 1024}},
    "wide bf16": {"model": WIDE, "train": {"precision": "bf16"}},
}  # fmt: skip


def run_config(sections: dict[str, Any]) -> Any:
    from configs import from_dict, resolve

    tree: dict[str, Any] = {
        "train": {"global_batch": 4, "seq_len": 256, "precision": "fp32", "sample_tokens": 0},
        "data": {"document_mask": False},
        "tracking": {"enabled": False},
    }
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return resolve(from_dict(tree))[0]


def random_batch(config: Any) -> Any:
    import torch

    from models.batch import Batch

    rows, length = config.train.micro_batch, config.train.seq_len
    ids = torch.randint(0, config.model.vocab_size, (rows, length + 1))
    positions = torch.arange(length).expand(rows, length)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, None, torch.arange(rows))


def states(engine: Any) -> dict[str, int]:
    """Bytes of unique storages that hold weights, optimizer states and gradients, without the reduction's bucket."""
    parameters, optimizer, base = list(engine.module.parameters()), engine.deepspeed.optimizer, engine.optimizer
    stepped = [p for group in base.param_groups for p in group["params"]]
    stepped += getattr(optimizer, "fp32_partitioned_groups_flat", [])

    def held(*names: str) -> list[Any]:
        return [getattr(optimizer, name, None) for name in names]

    kinds = {
        "weights": [[p.data for p in parameters], [getattr(p, "ds_tensor", None) for p in parameters],
                    held("bit16_groups_flat", "bf16_groups_flat", "lp_param_buffer")],
        "optimizer": [stepped, dict(base.state)],
        "bucket": [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()],
        "gradients": [[p.grad for p in [*parameters, *stepped]], [getattr(p, "grad_accum", None) for p in parameters],
                      held("averaged_gradients", "all_grad_tensors", "fp32_groups_gradients_flat",
                           "grad_partitions_flat_buffer")],
    }  # fmt: skip
    seen: set[int] = set()
    sums = {}
    for kind, things in kinds.items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(things)}
        sums[kind] = sum(size for place, size in storages.items() if place not in seen)
        seen |= set(storages)
    return sums


def _tensors(things: Any) -> Iterator[Any]:
    import torch

    if isinstance(things, torch.Tensor):
        yield things
    elif isinstance(things, dict):
        yield from _tensors(list(things.values()))
    elif isinstance(things, list | tuple):
        for thing in things:
            yield from _tensors(thing)


def serve(sections: dict[str, Any], rank: int, world: int, port: int, steps: int, keep: bool, pipe: Any) -> None:
    """One process of one run: train, and answer with what was predicted and measured."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from models.families import build
    from models.planning.plan import predict
    from models.tasks.language_modelling import LanguageModelling
    from models.tasks.learner import Learner
    from trainer.engine import start
    from trainer.engine.engine import Engine
    from trainer.health.rates import Rates, device_facts, measure
    from trainer.processes.collectives import from_all
    from trainer.record.forecast import PeakMemory
    from trainer.step import train_step

    as_trainer = start.keep_freed_memory
    if not keep:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: larger blocks are mapped and unmapped
        start.keep_freed_memory = lambda: None
    config = run_config(sections)
    start.start_processes(600)
    precision = config.train.precision
    measured = [Rates(**each) for each in from_all(asdict(measure(start.device(), precision)))]
    device = device_facts(start.device(), precision, measured)
    assert device
    plan = predict(config, device)
    gc.collect()
    peak = PeakMemory(start.device())
    module = build(config.model)
    module.init_weights(0)  # type: ignore[operator]
    module.set_activation_checkpointing(config.train.recompute_every)  # type: ignore[operator]
    engine = Engine(module, config)
    learner = Learner(LanguageModelling(config), {"": engine.module})
    step, found = engine.step, {}

    def measured_step() -> None:
        if engine.deepspeed.is_gradient_accumulation_boundary() and len(times) == steps - 1:
            found.update(states(engine))
        step()

    engine.step = measured_step
    times: list[float] = []
    tokens = torch.tensor(config.train.global_batch * config.train.seq_len, dtype=torch.float64)
    highest = None
    for number in range(2 * steps):
        if number == steps:
            highest = peak.bytes()
            as_trainer()
        batches = [random_batch(config) for _ in range(engine.accumulation)]
        start = time.perf_counter()
        train_step({"model": engine}, learner, batches, tokens, config)
        times.append(time.perf_counter() - start)
    pipe.send((plan, found, highest, statistics.median(times[steps + 1 :])))


def measure(sections: dict[str, Any], steps: int, keep: bool) -> list[Any]:
    """The answers of all processes of one run."""
    world = run_config(sections).parallel.world_size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(sections, rank, world, port, steps, keep, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()


DENSE_RUN = ["model.num_experts=0", "model.num_heads=8", "model.hidden_size=256"]
WHOLE_RUNS: dict[str, list[str]] = {
    "quickstart": [],
    "quickstart bf16": ["train.precision=bf16"],
    "dense": DENSE_RUN,
    "dense, full recomputation": [*DENSE_RUN, "train.activation_checkpointing=full"],
    "dense, ZeRO-1": [*DENSE_RUN, "parallel.zero_stage=1"],
    "dense, ZeRO-2, 2 processes": [*DENSE_RUN, "parallel.dp=2", "parallel.zero_stage=2"],
}
SHORT = ["train.steps=20", "optim.warmup=5", "train.eval_every=10", "checkpoint.every=10", "tracking.enabled=false"]


def whole_runs(names: list[str]) -> None:
    """Runs on the quickstart's data by `python -m trainer`, by the event `measured` of the first process."""
    from configs import load
    from trainer.record.lines import read_events
    from trainer.run.folder import prepare_run

    print("| run | peak, MB: predicted | measured | off | step, s: predicted | measured |\n|" + "---|" * 6)
    with tempfile.TemporaryDirectory() as root:
        for name, overrides in WHOLE_RUNS.items():
            if names and not any(word in name for word in names):
                continue
            own = [f"run.root={root}", f"run.name={name.replace(' ', '-').replace(',', '')}"]
            run = prepare_run(load("quickstart", [*SHORT, *overrides, *own]))
            world = 2 if "parallel.dp=2" in overrides else 1
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
                       "-m", "trainer", str(run / "config.yaml")]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment, cwd=Path(__file__).parents[1])
            told = next(event for event in read_events(run) if event["event"] == "measured")
            planned, peak = told["predicted_peak_memory"], told["peak_memory"]
            print(f"| {name} | {planned / 1e6:.0f} | {peak / 1e6:.0f} | {planned / peak - 1:+.1%} | "
                  f"{told['predicted_step_time']:.3f} | {told['step_time']:.3f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only runs whose name contains one of these words")
    parser.add_argument("--steps", type=int, default=4, help="steps for memory, and again as many for the time")
    parser.add_argument("--runs", action="store_true", help="whole runs of the trainer")
    parser.add_argument("--keep", action="store_true", help="keep freed memory, as the trainer does")
    parser.add_argument("--verbose", action="store_true", help="also print the parts")
    args = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, 1 thread per process\n")
    if args.runs:
        whole_runs(args.names)
        return
    print("| run | parameters, M | states: predicted, MB | measured | off | in all: predicted | measured | off "
          "| step: predicted, s | measured |")  # fmt: skip
    print("|" + "---|" * 10)
    offs: dict[str, list[float]] = {"states": [], "total": [], "time": []}
    for name, sections in RUNS.items():
        if args.names and not any(word in name for word in args.names):
            continue
        answers = measure(sections, args.steps, args.keep)
        plan = answers[0][0]
        held = max(sum(size for kind, size in found.items() if kind != "bucket") for _, found, _, _ in answers)
        total, seconds = max(answer[2] for answer in answers), max(answer[3] for answer in answers)
        planned = plan.memory.needed + (plan.memory.gaps if args.keep else 0)
        state_off, total_off = plan.memory.states / held - 1, planned / total - 1
        offs["states"].append(state_off)
        offs["total"].append(total_off)
        offs["time"].append(plan.step_time / seconds - 1)
        print(f"| {name} | {plan.parameters.total / 1e6:.1f} | {plan.memory.states / 1e6:.0f} | {held / 1e6:.0f} | "
              f"{state_off:+.1%} | {planned / 1e6:.0f} | {total / 1e6:.0f} | {total_off:+.1%} | "
              f"{plan.step_time:.2f} | {seconds:.2f} |", flush=True)  # fmt: skip
        if args.verbose:
            print(json.dumps(answers[0][1]), {k: round(v / 1e6) for k, v in plan.summary()["memory"]["parts"].items()},
                  {k: round(v / 1e6) for k, v in plan.memory.moments.items()})  # fmt: skip
    for kind, values in offs.items():
        print(f"\n{kind}: median off {statistics.median(map(abs, values)):.1%}, at most {max(map(abs, values)):.1%}")


if __name__ == "__main__":
    main()

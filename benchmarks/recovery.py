"""Seconds from kill -9 of a training process to the next finished step: muster beside stock Ray Train V2.

Both train the quickstart model on two processes with DeepSpeed (ZeRO-1, fp32), write a checkpoint every few steps, and
lose a process several times, at times drawn from a seed; they take turns, one run each. Ray Train is used as its manual
says: `TorchTrainer` with a failure budget, DeepSpeed's checkpoint reported with `ray.train.report` and read back by
`ray.train.get_checkpoint`. Each has a private Ray of its own. Run: `python benchmarks/recovery.py` (ten minutes).
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

EVERY = 20
"""Steps between checkpoints, for both."""
BATCH, SEQ_LEN = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", help="folder made by `muster data prepare`; default: the standard library's text")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(Path(options.peer))
        return
    took: dict[str, list[float]] = {"muster": [], "Ray Train V2": []}
    for turn in range(options.rounds):
        for contestant in took:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(contestant, Path(folder), options, random.Random(turn))
            took[contestant] += found
            print(f"{contestant}: {' '.join(f'{seconds:.1f}' for seconds in found)} s", flush=True)
    print("\n| from kill -9 to the next finished step | median | min to max | kills |\n|---|---|---|---|")
    for contestant, seconds in took.items():
        row = f"{statistics.median(seconds):.1f} s | {min(seconds):.1f} to {max(seconds):.1f} s | {len(seconds)}"
        print(f"| {contestant} | {row} |")
    ratio = statistics.median(took["muster"]) / statistics.median(took["Ray Train V2"])
    print(f"\nmuster takes {ratio:.2f} of Ray Train's time.")


def measure(contestant: str, folder: Path, options: argparse.Namespace, chance: random.Random) -> list[float]:
    """Start a run and kill one of its processes repeatedly. Returns the seconds of each recovery."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
    if contestant == "muster":
        overrides = [f"run.root={folder}", "run.name=run", "train.steps=1000000", "parallel.dp=2", "train.eval_every=0",
                     "parallel.zero_stage=1", f"checkpoint.every={EVERY}", "tracking.enabled=false"]  # fmt: skip
        overrides += [f"data.path={options.data}"] if options.data else []
        command = [sys.executable, "-P", "-m", "cluster.cli", "train", "quickstart", *overrides]
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        steps, pids = folder / "run" / "metrics.jsonl", muster_pids
    else:
        command = [sys.executable, __file__, "--peer", str(folder)]
        steps, pids = folder / "steps.jsonl", peer_pids
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
        try:
            took = []
            for _ in range(options.kills):
                wait(steps, process, count(steps) + EVERY + chance.randrange(1, EVERY), folder)
                victim = chance.choice(pids(folder))
                before = time.time()
                os.kill(victim, signal.SIGKILL)
                time.sleep(1.0)  # what was being written when the process died
                seen = count(steps)
                wait(steps, process, seen + 1, folder)
                took.append(times(steps)[seen] - before)
            return took
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def muster_pids(folder: Path) -> list[int]:
    newest = max(path.name[:10] for path in (folder / "run" / "logs").iterdir())
    logs = (folder / "run" / "logs").glob(f"{newest}-rank-*.log")
    return [int(re.findall(r" pid (\d+)", log.read_text())[-1]) for log in logs]


def peer_pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*")]


def times(steps: Path) -> list[float]:
    lines = steps.read_text().splitlines() if steps.exists() else []
    return [json.loads(line)["time"] for line in lines if '"loss"' in line]


def count(steps: Path) -> int:
    return len(times(steps))


def wait(steps: Path, process: subprocess.Popen, number: int, folder: Path) -> None:
    end = time.monotonic() + 300
    while count(steps) < number:
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"it ended or hangs:\n{(folder / 'output').read_text()[-4000:]}")
        time.sleep(0.05)


def peer(folder: Path) -> None:
    """Train with stock Ray Train V2 until the process is killed."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {
        "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}})  # fmt: skip
    TorchTrainer(
        peer_loop,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="run", storage_path=str(folder), failure_config=FailureConfig(max_failures=-1)),
    ).fit()


def peer_loop(job: dict) -> None:
    import deepspeed
    import ray.train
    import torch

    from configs import load, resolve
    from models.batch import Batch
    from models.families import build

    folder, rank = Path(job["folder"]), ray.train.get_context().get_world_rank()
    config = resolve(load("quickstart"), vocab_size=4096)[0].model
    model = build(config)
    model.init_weights(0)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
        "train_micro_batch_size_per_gpu": BATCH // 2, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    })  # fmt: skip
    step = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as path:
            engine.load_checkpoint(path)
        step = engine.global_steps
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    tokens = torch.Generator().manual_seed(rank)
    positions, sequences = torch.arange(SEQ_LEN).expand(BATCH // 2, -1), torch.arange(BATCH // 2)
    while True:
        ids = torch.randint(4096, (BATCH // 2, SEQ_LEN + 1), generator=tokens)
        out = engine(Batch(ids[:, :-1], ids[:, 1:], positions, None, sequences))
        loss = out.loss_sum / out.tokens
        engine.backward(loss)
        engine.step()
        step += 1
        if rank == 0:
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": loss.item(), "time": time.time()}) + "\n")
        if step % EVERY == 0:
            target = folder / f"saved-{step}"
            engine.save_checkpoint(str(target))
            ray.train.report({"loss": loss.item()}, checkpoint=ray.train.Checkpoint(target) if rank == 0 else None)


if __name__ == "__main__":
    main()

"""Every family's preset through the trainer and through a bare PyTorch loop, in turn: scores, and steps per second.

Both train the same network from the same weights on the same examples with torch's own optimizer at the same learning
rates, for as many steps as the preset has; the bare loop has no process group, no DeepSpeed, no record. They are two
processes that take turns, a few steps each, so that noise of the machine affects both; the ratio of their times is the
median over turns. Run: `python benchmarks/families.py [--only digits-vae,lstm] [--steps N] [--out FOLDER]`.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

LARGE = {"dense-7b", "dense-small", "moe-1b-a300m", "moe-8x7b"}
"""Presets for GPUs."""
KEYS = ["tracking.enabled=false", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=0"]
TURN = 10
"""Steps of a turn; the first turn of each warms up, and does not count."""


def prepared(name: str, folder: str, steps: int | None) -> Path:
    """The run's folder, with its data prepared."""
    from configs import load
    from trainer.run.folder import prepare_run

    keys = [*KEYS, f"run.root={folder}", *([f"train.steps={steps}"] if steps else [])]
    return prepare_run(load(name, keys))


def serve_trainer(run_dir: Path, pipe: Any) -> None:
    """The whole trainer, made to wait before each turn."""
    from trainer import loop
    from trainer.record.lines import read_metrics
    from trainer.trainee import Trainee

    original = Trainee.set_learning_rate
    left, start = 0, 0.0

    def gate(*arguments: Any) -> float:
        nonlocal left, start
        if left == 0:
            if start:
                pipe.send(time.perf_counter() - start)
            left, start = pipe.recv(), time.perf_counter()
        left -= 1
        return original(*arguments)

    Trainee.set_learning_rate = gate  # type: ignore[assignment, method-assign]
    # `loop.train` evaluates at the end of the last turn, whose time is therefore not asked for.
    loop.train(run_dir)
    last = [line for line in read_metrics(run_dir) if "eval_loss" in line][-1]
    pipe.send({key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")})


def serve_bare(run_dir: Path, pipe: Any) -> None:
    """A bare loop over the same network, examples and learning rates."""
    import torch

    from models.tasks.table import task_of
    from models.tasks.task import trained_only
    from trainer.data.kinds import kind_of
    from trainer.engine.optim import build_optimizer, parameter_groups
    from trainer.observe.held_out import held_out_metrics
    from trainer.run.folder import read_config
    from trainer.schedule import learning_rates, optimizer_of

    config = read_config(run_dir)
    train, task = config.train, task_of(config)
    module = network(config)
    low = torch.bfloat16 if train.precision == "bf16" else None
    nets = {phase.name: module.get_submodule(phase.parameters) for phase in task.phases}
    task.attach({phase.parameters: nets[phase.name] for phase in task.phases})
    optimizers = {}
    for phase in task.phases:
        optim = optimizer_of(config, phase)
        optimizers[phase.name] = build_optimizer(parameter_groups(nets[phase.name], optim), optim)
    averaged = average_of(module, config)
    dataset = kind_of(config).open(config, "train")
    assert dataset
    assert train.micro_batch

    def step(number: int, cursor: int) -> None:
        indices = range(cursor, cursor + train.global_batch)
        parts = [list(indices[i : i + train.micro_batch]) for i in range(0, train.global_batch, train.micro_batch)]
        batches = [dataset.examples(part) for part in parts]
        weight = max(sum(batch.weight() for batch in batches), 1)
        for name, rate in learning_rates(number, config, task.phases).items():
            for group in optimizers[name].param_groups:
                group["lr"] = rate
        for phase in task.phases:
            if number % phase.every:
                continue
            with trained_only(nets, phase.name):
                for batch in batches:
                    with torch.autocast("cpu", low) if low else nullcontext():
                        sums = task.loss(nets, batch, phase.name)
                    loss = sums.loss / weight
                    loss = loss if sums.penalty is None else loss + sums.penalty / len(batches)
                    loss.backward()
            parameters = list(nets[phase.name].parameters())
            if train.grad_clip:
                torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip, foreach=True)
            optimizers[phase.name].step()
            optimizers[phase.name].zero_grad()
        if averaged:
            averaged.update_parameters(module)

    done = 0
    while done < train.steps:
        left, start = pipe.recv(), time.perf_counter()
        for _ in range(min(left, train.steps - done)):
            step(done + 1, done * train.global_batch)
            done += 1
        if done < train.steps:
            pipe.send(time.perf_counter() - start)
    scored = (averaged.module if averaged else module).eval()
    held_out = kind_of(config).open(config, "held_out")
    assert held_out
    ours = {phase.name: scored.get_submodule(phase.parameters) for phase in task.phases}
    count = min(train.eval_sequences, len(held_out))
    with torch.no_grad():
        loss, _, metrics = held_out_metrics(task, ours, held_out, count, train.micro_batch, torch.device("cpu"))
    pipe.send({"loss": loss, **metrics})


def network(config: Any) -> Any:
    """The run's network with its first weights, as the trainer makes it."""
    from models.families import build
    from models.init import fill
    from models.spectral_memory import fill_vectors

    module = build(config.model)
    fill(module, config.run.seed)
    fill_vectors(module, config.run.seed)
    return module.train()


def average_of(module: Any, config: Any) -> Any:
    """torch's own moving average, if the preset has one."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    decay = config.optim.ema_decay
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None


def serve(which: str, run_dir: Path, threads: int, pipe: Any) -> None:
    import torch

    torch.set_num_threads(threads)
    {"trainer": serve_trainer, "bare": serve_bare}[which](run_dir, pipe)


def in_turn(run_dir: Path, steps: int, threads: int) -> dict[str, Any]:
    """Both contestants' seconds of each turn, and their scores."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, times = {}, [], {"trainer": [], "bare": []}
    for which in times:
        pipes[which], end = context.Pipe()
        process = context.Process(target=serve, args=(which, run_dir, threads, end))
        process.start()
        end.close()
        processes.append(process)
    scores = {}
    for turn in range(math.ceil(steps / TURN)):
        for which in list(times)[:: 1 if turn % 2 else -1]:
            pipes[which].send(TURN)
            answer = pipes[which].recv()
            if isinstance(answer, dict):
                scores[which] = answer
            elif turn:
                times[which].append(answer)
    for process in processes:
        process.join()
    return {"times": times, "scores": scores}


def row(name: str, folder: str, steps: int | None, threads: int) -> dict[str, Any]:
    from configs import load

    run_dir = prepared(name, folder, steps)
    config = load(run_dir / "config.yaml")
    found = in_turn(run_dir, config.train.steps, threads)
    trainer, bare = (found["times"][which] for which in ("trainer", "bare"))
    ratios = [b / t for t, b in zip(trainer, bare, strict=True)]
    return {
        "preset": name, "family": config.model.family, "task": config.task, "steps": config.train.steps,
        "steps_per_second": TURN / statistics.median(trainer), "bare_steps_per_second": TURN / statistics.median(bare),
        "ratio": statistics.median(ratios), "scores": found["scores"],
    }  # fmt: skip


def score_of(scores: dict[str, Any]) -> tuple[str, float]:
    """The one that a person would look at: the task's own metric, else the loss."""
    for name in ("accuracy", "r2", "exact", "coverage", "mse"):
        if isinstance(scores.get(name), float):
            return name, scores[name]
    return "loss", scores["loss"]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """As Markdown."""
    yield "| preset | family | task | held out | bare loop | steps/s | bare loop | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in rows:
        name, mine = score_of(each["scores"]["trainer"])
        other = each["scores"]["bare"].get(name, math.nan)
        yield (
            f"| {each['preset']} | {each['family']} | {each['task']} | {name} {mine:.4f} | {other:.4f} | "
            f"{each['steps_per_second']:.2f} | {each['bare_steps_per_second']:.2f} | {each['ratio']:.3f} |"
        )


def main() -> None:
    from configs import preset_names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="presets, separated by commas; default: all that are for a CPU")
    parser.add_argument("--steps", type=int, help="in place of each preset's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder of the runs, kept, and of results.json")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else [name for name in preset_names() if name not in LARGE]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            rows.append(row(name, str(folder), given.steps, given.threads))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            (folder / "results.json").write_text(json.dumps(rows, indent=1))
    print(
        f"{platform.processor() or platform.machine()}, {given.threads} threads, Python {platform.python_version()}\n"
    )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()

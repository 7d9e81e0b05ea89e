"""Test helpers: tiny data and configs, two long-lived processes, and runs in cheap separate processes."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs import Config, from_dict, resolve

TINY_MODEL = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "num_experts": 4, "expert_size": 32,
    "vocab_size": 320,
}  # fmt: skip


def tiny(**sections: Any) -> Config:
    """An unresolved config of a tiny MoE model; sections are merged into it."""
    tree: dict[str, Any] = {
        "model": dict(TINY_MODEL),
        "train": {"steps": 6, "global_batch": 4, "seq_len": 32, "precision": "fp32", "sample_tokens": 0,
                  "eval_sequences": 4},
        "tracking": {"enabled": False},
    }  # fmt: skip
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return from_dict(tree)


def resolved(**sections: Any) -> Config:
    return resolve(tiny(**sections))[0]


def prepare_tiny(folder: Path) -> Path:
    """Prepare a few hundred generated lines of Python as byte tokens."""
    from configs.sections.data import PrepareConfig
    from trainer.data.prepare.prepare import prepare

    raw = folder / "raw"
    raw.mkdir()
    for number in range(24):
        lines = [f"def f{number}_{i}(x):\n    return x * {i * number % 97} + {i}\n" for i in range(24)]
        (raw / f"module_{number}.py").write_text("\n".join(lines))
    out = folder / "prepared"
    prepare([str(raw)], out, PrepareConfig(tokenizer="bytes", held_out=0.2), workers=1, progress=False)
    return out


class Pair:
    """Two processes in one process group, which run module-level functions handed to them."""

    def __enter__(self) -> "Pair":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = forking()
        self._pipes, self._processes = [], []
        for rank in range(2):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, 2, port, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `function(*arguments)` in both processes. Returns [rank 0's result, rank 1's]."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() if pipe.poll(120) else ("error", "no answer within 120 s") for pipe in self._pipes]
        errors = [text for kind, text in answers if kind == "error"]
        if errors:
            raise AssertionError(errors[0])
        return [value for _, value in answers]


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from deepspeed.utils import groups

    from trainer.engine.start import start_processes

    start_processes(60)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send(("ok", function(*arguments)))
        except BaseException:
            pipe.send(("error", f"rank {rank}: {traceback.format_exc()}"))
        groups.mpu = None  # otherwise the next engine takes its ranks' coordinates from the last pipeline
    torch.distributed.destroy_process_group()


def forking() -> Any:
    """Where processes fork from one that has imported what every run needs, torch's compiler too, which its optimizers
    import as they are built: 80% of a tiny run's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.loop", "torch._dynamo"])
    return context


def train_in_process(run_dir: Path, before: Callable[..., None] | None = None, *arguments: Any) -> int:
    """Train a prepared run in a process of its own, which forks from one that has imported everything.

    Args:
        before: module-level function called there first (to inject a fault), with `arguments`.

    Returns:
        its exit code: 0 finished, 75 stopped, negative: the signal that killed it.
    """
    process = forking().Process(target=_train, args=(run_dir, before, arguments))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode


def _train(run_dir: Path, before: Callable[..., None] | None, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if before:
        before(*arguments)
    from trainer.loop import train

    status = train(run_dir)
    # As in `python -m trainer`: torch's threads must not keep a finished process alive.
    raise SystemExit(0 if status == "FINISHED" else 75)

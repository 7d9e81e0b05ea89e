"""Saving a checkpoint: DeepSpeed's own `save_checkpoint`, plain and decoupled, against ours, side by side in one run.

The contestants train the same model of about 36M parameters. The plain, foreground and background ones share one
engine and take turns: a step, a save, and more steps until the save is on disk. DeepSpeed's decoupled writer is a
setting of the engine, so it has processes of its own, which also take turns. Peak memory is measured separately, in
fresh processes for each contestant. Run: `python benchmarks/checkpoint.py`; `--processes 1 4 --rounds 5`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ["OMP_NUM_THREADS"] = "1"  # every process is one of several on few cores

MODEL = {"num_layers": 4, "hidden_size": 384, "num_heads": 6, "num_kv_heads": 2, "num_experts": 16,
         "expert_size": 384, "top_k": 2, "vocab_size": 4096}  # fmt: skip
PLAIN, DECOUPLED = "DeepSpeed save_checkpoint", "DeepSpeed decoupled writer"
FRONT, BACK = "muster, foreground", "muster, background"
SHARED = [PLAIN, FRONT, BACK]
AFTER = 3
"""Steps timed after a save, to see what the writer costs them."""


def run_config(processes: int) -> Any:
    from configs import from_dict, resolve

    tree = {
        "model": MODEL,
        "train": {"global_batch": processes, "micro_batch": 1, "seq_len": 32, "precision": "bf16"},
        "parallel": {"dp": processes, "zero_stage": 1 if processes == 1 else 2},
        "checkpoint": {"keep": 1},
    }
    return resolve(from_dict(tree))[0]


class Trainee:
    """One rank: an engine trained on random tokens, and each contestant's way to save it."""

    def __init__(self, processes: int, decoupled: bool, folder: Path):
        import torch

        from models.families import build
        from trainer.checkpoint.save import Saver
        from trainer.engine import engine as ours
        from trainer.engine.start import start_processes

        torch.set_num_threads(1)
        torch.manual_seed(0)
        config, plain = run_config(processes), ours.engine_config
        if decoupled:
            writer = {"checkpoint": {"writer": {"type": "python", "decoupled": True, "data_parallel": "replica"}}}
            ours.engine_config = lambda config: plain(config) | writer  # type: ignore[assignment]
        start_processes(600)
        module = build(config.model)
        module.init_weights(0)
        self.engine, self.config, self.folder, self.saves = ours.Engine(module, config), config, folder, 0
        settings = config.model_dump(mode="json")
        self.savers = {
            name: Saver(folder / name, settings, None, background=name == BACK, timeout_s=600) for name in (FRONT, BACK)
        }
        self.committing = 0.0
        if decoupled:
            commit = self.engine.deepspeed.checkpoint_engine.commit

            def timed(info: Any) -> Any:
                start = time.perf_counter()
                done = commit(info)
                self.committing += time.perf_counter() - start
                return done

            self.engine.deepspeed.checkpoint_engine.commit = timed
        self.step()
        self.step()

    def step(self) -> float:
        """Take a training step. Returns its seconds."""
        import torch

        from models.batch import Batch

        start = time.perf_counter()
        ids = torch.randint(0, MODEL["vocab_size"], (1, 33))
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.arange(32)[None], None, torch.arange(1))
        self.engine.backward(self.engine(batch).loss_sum / 32)
        self.engine.step()
        return time.perf_counter() - start

    def save(self, name: str) -> Callable[[], None]:
        """Save as `name` does. Returns a function that returns when the save is durable as far as `name` cares."""
        from trainer.state import TrainState

        self.saves += 1
        if name in self.savers:
            self.savers[name].save([self.engine], TrainState(step=self.saves), 1)
            return self.savers[name].wait
        self.engine.deepspeed.save_checkpoint(str(self.folder / name), tag=str(self.saves))
        return lambda: self.engine.deepspeed._commit_decoupled_checkpoint() if name == DECOUPLED else None

    def turn(self, name: str) -> dict[str, float]:
        """One save with steps around it. Returns seconds by kind; each rank has its own."""
        from torch import distributed as dist

        plain = statistics.mean(self.step() for _ in range(2))
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        dist.barrier()
        self.committing, start, used = 0.0, time.perf_counter(), time.thread_time()
        wait = self.save(name)
        call, used = time.perf_counter() - start, time.thread_time() - used
        for _ in range(AFTER):
            self.step()
        lost = time.perf_counter() - start - AFTER * plain
        wait()
        if name == BACK:
            call = self.savers[name].stalled  # includes the optimizer's wait for the copy
        # Once more without steps beside it, to see how long it takes to reach the disk.
        dist.barrier()
        stall, start = call + self.committing, time.perf_counter()
        self.save(name)()
        dist.barrier()
        written = time.perf_counter() - start
        if name in (PLAIN, DECOUPLED) and dist.get_rank() == 0:
            flush(self.folder / name / str(self.saves))
        dist.barrier()
        durable = time.perf_counter() - start
        return {"stall": stall, "cpu": used, "lost": lost, "written": written, "durable": durable, "step": plain}

    def growth(self, name: str) -> float:
        """Peak memory of a save above what training holds, in 10^6 bytes: anonymous and shared, the writer included."""
        with Peak() as peak:
            self.save(name)()
        return peak.growth


class Peak:
    """Samples the anonymous and shared memory of this process and its children; file pages belong to the kernel."""

    def __enter__(self) -> "Peak":
        self.base = self.peak = self.now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.001):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.growth = self.peak - self.base

    @staticmethod
    def now() -> float:
        total = 0
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for process in ["self", *children]:
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                # Memory that a child shares with its parent is counted for the parent.
                if line.startswith("RssAnon") or (process == "self" and line.startswith("RssShmem")):
                    total += int(line.split()[1])
        return total * 1024 / 1e6


def flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def serve(rank: int, processes: int, port: int, decoupled: bool, folder: Path, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        CROSS_RANK="0", CROSS_SIZE="1",
    )  # fmt: skip
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    trainee = Trainee(processes, decoupled, folder)
    pipe.send(None)
    try:
        while True:
            name, *arguments = pipe.recv()
            pipe.send(getattr(trainee, name)(*arguments))
    except EOFError:
        trainee.engine.destroy()
    except BaseException:
        traceback.print_exc()
        if decoupled:  # otherwise DeepSpeed's writer would outlive this process
            trainee.engine.deepspeed.checkpoint_engine.ckpt_process.kill()
    os._exit(0)


class Team:
    """The processes of one engine."""

    def __init__(self, processes: int, decoupled: bool, folder: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.engine.engine", "trainer.checkpoint.save", "models.families"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.members = [], []
        for rank in range(processes):
            mine, theirs = context.Pipe()
            member = context.Process(target=serve, args=(rank, processes, port, decoupled, folder, theirs))
            member.start()
            theirs.close()
            self.pipes.append(mine)
            self.members.append(member)
        self.answers()

    def answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            self.end()
            raise

    def ask(self, *job: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(job)
        return self.answers()

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for member in self.members:
            member.join(30)
            member.kill()


def compete(processes: int, rounds: int, decoupled: bool, folder: Path) -> None:
    names = [*SHARED, DECOUPLED] if decoupled else SHARED
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        teams = {}
        for kind in sorted({name == DECOUPLED for name in names}):
            teams[kind] = Team(processes, kind, folder)
            stack.callback(teams[kind].end)
        for _ in range(rounds + 1):  # the first is a warm-up, in which all allocate their buffers
            for name in list(results):
                try:
                    answers = teams[name == DECOUPLED].ask("turn", name)
                except (EOFError, BrokenPipeError):
                    print(f"{name} did not run", flush=True)
                    del results[name]
                    continue
                results[name].append({key: max(answer[key] for answer in answers) for key in answers[0]})
                print(name, {key: round(value, 3) for key, value in results[name][-1].items()}, file=sys.stderr)
    growth = {}
    for name in results:
        team = Team(processes, name == DECOUPLED, folder / "apart")
        growth[name] = max(team.ask("growth", name))
        team.end()
    step = statistics.median(turn["step"] for turns in results.values() for turn in turns[1:])
    print(f"\n{processes} processes, ZeRO-{1 if processes == 1 else 2}; a step takes {step:.2f} s\n")
    print("| contestant | stall, s | x plain | CPU in the call, s | lost, s | written, s | durable, s | memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (_, *turns) in results.items():
        pairs = zip(turns, results[PLAIN][1:], strict=True)
        ratio = statistics.median(turn["stall"] / plain["stall"] for turn, plain in pairs)
        middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        low, high = min(turn["stall"] for turn in turns), max(turn["stall"] for turn in turns)
        print(
            f"| {name} | {middle['stall']:.3f} ({low:.3f} to {high:.3f}) | {ratio:.2f} | {middle['cpu']:.3f} "
            f"| {middle['lost']:.2f} | {middle['written']:.2f} | {middle['durable']:.2f} | {growth[name]:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-decoupled", action="store_true", help="leave DeepSpeed's decoupled writer out")
    parser.add_argument("--folder", type=Path, help="where to write: a folder on the file system to be measured")
    args = parser.parse_args()
    from models.planning.cost import parameters

    print(json.dumps({"model": MODEL, "parameters": parameters(run_config(1).model).total, "cores": os.cpu_count()}))
    for processes in args.processes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            compete(processes, args.rounds, not args.no_decoupled, Path(folder))


if __name__ == "__main__":
    main()

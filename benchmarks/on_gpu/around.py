"""What surrounds a step: resuming, warm processes, starting, checkpoints, data.

The trainer runs as it does for users, `python -m trainer CONFIG`, in processes of its own.
"""

import contextlib
import functools
import importlib.util
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import Part, Row, Setting
from .checks import MOE, Trained, attempt, random_batch, small_config, within

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT)]
"""Where a trainer's process finds modules."""
if importlib.util.find_spec("pyarrow") is None:
    PATHS.append(str(Path(__file__).parent / "stand_in"))
    sys.path.append(PATHS[-1])

FORKS = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OPENBLAS_NUM_THREADS": "1"}
"""Makes it safe for `trainer.processes.warm` to fork; as `cluster.gangs.worker.ENVIRONMENT`, whose import needs Ray."""
OF_THIS_PROCESS = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR",
    "TORCHINDUCTOR_COMPILE_THREADS",
}  # fmt: skip
"""Environment variables that no other process should get."""


class Length(NamedTuple):
    """A run that is killed: its steps, the step after which it is killed, and the steps between its checkpoints."""

    steps: int
    killed: int
    every: int


def length_of(setting: Setting) -> Length:
    return Length(24, 8, 3) if setting.dry else Length(100, 35, 10)


def environment(setting: Setting, **more: str) -> dict[str, str]:
    """The environment of a process that trains alone."""
    kept = {key: value for key, value in os.environ.items() if key not in OF_THIS_PROCESS}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}
    paths = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | hidden | more


def data_folder(setting: Setting, tokens: int = 0) -> Path:
    """Prepared data: files of this Python's standard library as bytes, with about as many tokens as asked for."""
    from configs.sections.data import PrepareConfig
    from trainer.data.prepare.prepare import prepare

    raw, out = setting.folder / "raw", setting.folder / "tokens"
    if not out.exists():
        raw.mkdir(parents=True, exist_ok=True)
        size, wanted = 0, tokens or 400_000
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            if size < wanted:
                text = path.read_bytes()
                (raw / f"{path.stem}.txt").write_bytes(text)
                size += len(text)
        config = PrepareConfig(tokenizer="bytes", row_group_tokens=1 << 14, held_out=0.3)
        prepare([raw], out, config, workers=1, progress=False)
        shutil.rmtree(raw)
    return out


def run_config(setting: Setting, name: str, **over: dict[str, Any]) -> Path:
    """The config file of a run: a small MoE model in bf16 on prepared data."""
    if setting.dry:
        sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "expert_size": 64}
        train = {"seq_len": 64, "global_batch": 4}
    else:
        sizes = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "expert_size": 256}
        train = {"seq_len": 256, "global_batch": 16}
    tree: dict[str, Any] = {
        "run": {"name": name, "root": str(setting.folder / "runs")},
        "model": sizes | MOE | over.pop("model", {}),
        "train": {"steps": length_of(setting).steps, "precision": "bf16", "sample_tokens": 0, "eval_sequences": 8}
        | train | over.pop("train", {}),
        "optim": {"schedule": "constant", "lr": 1e-3},
        "data": {"path": str(data_folder(setting))},
        "checkpoint": {"every": length_of(setting).every, "keep": 20},
        "tracking": {"enabled": False},
    } | over  # fmt: skip
    path = setting.folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def trainer(setting: Setting, config: Path, *overrides: str, **variables: str) -> subprocess.Popen:
    """Start the trainer; its output goes to a file beside the config."""
    log = config.with_suffix(".log").open("ab")
    command = [sys.executable, "-P", "-m", "trainer", str(config), *overrides]
    return subprocess.Popen(
        command, env=environment(setting, **variables), cwd=setting.folder, stdin=subprocess.DEVNULL,
        stdout=log, stderr=log,
    )  # fmt: skip


def ended(process: subprocess.Popen, config: Path, seconds: float) -> None:
    """Wait for a trainer to succeed. Raises RuntimeError with the end of its output."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = f"no end after {seconds:.0f} s"  # type: ignore[assignment]
    if code != 0:
        raise RuntimeError(f"the trainer: {code}; {config.with_suffix('.log').read_text(errors='replace')[-400:]}")


def steps_of(setting: Setting, name: str) -> dict[int, dict[str, Any]]:
    """The last line of each step in a run's metrics.jsonl."""
    path = setting.folder / "runs" / name / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # the last, half written
            row = json.loads(line)
            if "loss" in row:
                found[row["step"]] = row
    return found


def events_of(setting: Setting, name: str) -> list[dict[str, Any]]:
    path = setting.folder / "runs" / name / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors_of(setting: Setting, name: str, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    from safetensors.torch import load_file

    from trainer.checkpoint.manifest import folder

    path = folder(setting.folder / "runs" / name, step)
    return {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def resume(setting: Setting) -> Iterator[Row]:
    """A run that was killed and resumed, compared with one that was not; a checkpoint from the GPU on a CPU."""
    length, configs = length_of(setting), {name: run_config(setting, name) for name in ("straight", "killed")}
    started: list[subprocess.Popen] = []
    try:
        started += [trainer(setting, config) for config in configs.values()]

        def kill_and_go_on() -> Row:
            process, until = started[1], time.monotonic() + setting.seconds
            metrics = setting.folder / "runs" / "killed" / "metrics.jsonl"
            while process.poll() is None and time.monotonic() < until:
                if metrics.exists() and metrics.read_bytes().count(b"\n") >= length.killed:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(0.002)
            assert process.returncode == -signal.SIGKILL, f"it ended by itself, with {process.returncode}"
            at = max(steps_of(setting, "killed"))
            assert at < length.steps, "it was killed too late"
            started.append(trainer(setting, configs["killed"]))
            ended(started[2], configs["killed"], setting.seconds)
            went_on = [event["step"] for event in events_of(setting, "killed") if event["event"] == "resumed"]
            before = at // length.every * length.every  # or the one before, if this one was not written yet
            good = went_on in ([before], [before - length.every])
            return {"ok": good, "killed_after": at, "went_on_from": str(went_on)}

        def ran_through() -> Row:
            ended(started[0], configs["straight"], setting.seconds)
            return {"ok": True}

        yield attempt("killed and started again", kill_and_go_on)
        yield attempt("the other ran through", ran_through)
        yield attempt("losses of every step", functools.partial(same_record, setting))
        yield attempt("tensors of the last checkpoint", functools.partial(same_tensors, setting))
        yield attempt("the checkpoint on a CPU", functools.partial(on_cpu, setting, configs))
    finally:
        for process in started:
            process.kill()


def same_record(setting: Setting) -> Row:
    """Compare losses and gradient norms of both runs step by step; if they differ, from which step and by how much."""
    one, other, last = steps_of(setting, "straight"), steps_of(setting, "killed"), length_of(setting).steps
    assert list(one) == list(range(1, last + 1)), f"{len(one)} steps"
    assert sorted(other) == list(one), f"{len(other)} steps"
    unequal = [n for n in one if any(one[n][key] != other[n][key] for key in ("loss", "grad_norm"))]
    error = max(abs(one[n]["loss"] - other[n]["loss"]) / one[n]["loss"] for n in one)
    row = {"unequal_steps": len(unequal), "first_unequal": unequal[0] if unequal else None}
    return within(error, 0.0, first=one[1]["loss"], last=one[last]["loss"]) | row


def same_tensors(setting: Setting) -> Row:
    one, other = (tensors_of(setting, name, length_of(setting).steps) for name in ("straight", "killed"))
    assert one, "no tensors"
    assert one.keys() == other.keys(), f"{len(one)} and {len(other)} tensors"
    unequal = [key for key in one if not torch.equal(one[key], other[key])]
    error = max(float((one[key] - other[key]).abs().max()) for key in one)
    return within(error, 0.0, tensors=len(one), unequal=len(unequal))


def on_cpu(setting: Setting, configs: dict[str, Path]) -> Row:
    """One more step, on the device and on a CPU, both from checkpoints that the device wrote."""
    last = length_of(setting).steps
    more = f"train.steps={last + 1}"
    processes = [
        trainer(setting, configs["straight"], more),
        trainer(setting, configs["killed"], more, CUDA_VISIBLE_DEVICES=""),
    ]
    try:
        for process, name in zip(processes, configs, strict=True):
            ended(process, configs[name], setting.seconds)
    finally:
        for process in processes:
            process.kill()
    read = [event for event in events_of(setting, "killed") if event["event"] in ("attempt_started", "resumed")][-2:]
    device, resumed = read[0]["device"], read[1]["step"]
    one, other = (steps_of(setting, name)[last + 1]["loss"] for name in configs)
    row = within(abs(one - other) / one, 2e-3, device=device, resumed=resumed, on_device=one, on_cpu=other)
    return row | {"ok": row["ok"] and device == "cpu" and resumed == last}


def warm(setting: Setting) -> Iterator[Row]:
    """`trainer.processes.warm`: forks of a process that has imported everything train on the device."""
    from configs import load
    from trainer.run.folder import prepare_run

    with (setting.folder / "warm.log").open("wb") as log:
        began = time.monotonic()
        command = [sys.executable, "-P", "-m", "trainer.processes.warm"]
        process = subprocess.Popen(
            command,
            env=environment(setting, **FORKS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin

    def answer(seconds: float) -> dict[str, Any]:
        assert process.stdout
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"no answer after {seconds:.0f} s")
        return json.loads(process.stdout.readline())

    def one_attempt(name: str) -> Row:
        assert process.stdin
        run_dir = prepare_run(load(run_config(setting, name, train={"steps": 5}, checkpoint={"every": 0})))
        job = {"run_dir": str(run_dir), "folder": str(setting.folder), "patience": 0, "environment": {"RANK": "0"}}
        asked = time.time()
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        pid = answer(60)["pid"]
        time.sleep(0.3)
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        said = answer(setting.seconds)
        if "FINISHED" not in said.values():
            raise RuntimeError(json.dumps(said)[-1500:])
        steps = steps_of(setting, name)
        device = next(e["device"] for e in events_of(setting, name) if e["event"] == "attempt_started")
        good = list(steps) == list(range(1, 6)) and device.startswith(setting.device)
        return {
            "ok": good, "device": device, "forked": len([a for a in arguments if a]) <= 5,
            "first_step_s": steps[1]["time"] - asked, "since_start_s": time.monotonic() - began,
        }  # fmt: skip

    try:
        for name in ("first", "second"):
            yield attempt(f"{name} attempt of one warm process", functools.partial(one_attempt, name))
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()


def start(setting: Setting) -> Iterator[Row]:
    """Seconds from starting a process to the end of its first and second step."""
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("eager, cold", {}, "eager"), ("eager, again", {}, "eager"),
        ("compiled, cold", {"compile": True}, "compiled"), ("compiled, again", {"compile": True}, "compiled"),
    ]  # fmt: skip
    for number, (name, train, cache) in enumerate(cases):

        def check(number: int = number, train: dict[str, Any] = train, cache: str = cache) -> Row:
            run = f"start{number}"
            config = run_config(setting, run, train={"steps": 5} | train, checkpoint={"every": 0})
            caches = setting.folder / cache
            began = time.time()
            variables = {"TORCHINDUCTOR_CACHE_DIR": str(caches), "TRITON_CACHE_DIR": str(caches / "triton")}
            process = trainer(setting, config, **variables)
            try:
                ended(process, config, setting.seconds)
            finally:
                process.kill()
            over, steps, events = time.time(), steps_of(setting, run), events_of(setting, run)
            times = {event["event"]: event["time"] for event in events}
            return {
                "record_s": times["resolved"] - began, "attempt_s": times["attempt_started"] - began,
                "first_step_s": steps[1]["time"] - began, "second_step_s": steps[2]["time"] - began,
                "fifth_step_s": steps[5]["time"] - began, "end_s": over - began,
            }  # fmt: skip

        yield attempt(name, check) | {"case": name}


def large_config(setting: Setting, **over: dict[str, Any]) -> Any:
    """About 10^9 parameters."""
    if setting.dry:
        return small_config(setting, {}, train={"precision": "bf16"}, **over)
    sizes = {"num_layers": 16, "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 32, "vocab_size": 32000}
    train = {"seq_len": 2048, "global_batch": 4, "micro_batch": 4, "precision": "bf16"}
    return small_config(setting, sizes, train=train, **over)


BY_THREADS = "background, memory pinned by 8 threads"


def checkpoint(setting: Setting) -> Iterator[Row]:
    """How long a checkpoint stalls training, what is written, and how much slower steps are during the write."""
    from models.planning.cost import parameters
    from trainer.checkpoint.save import Saver
    from trainer.state import TrainState

    config = large_config(setting, parallel={"zero_stage": 1}, checkpoint={"keep": 1})
    until = time.monotonic() + setting.seconds
    trained = Trained(config, setting.device, quick=True)
    batch = random_batch(config)

    def step() -> float:
        began = time.perf_counter()
        trained.step(batch)
        return time.perf_counter() - began

    for _ in range(3):
        step()
    usual = statistics.median(step() for _ in range(5))
    folder, settings = setting.folder / "saved", config.model_dump(mode="json")
    free = shutil.disk_usage(setting.folder).free
    count = parameters(config.model).total
    yield {"parameters": count, "step_s": usual, "disk_free_gb": free / 1e9}
    assert free > 2.5 * 12 * count, "the disk is too full"
    number = 0
    for kind, background in (("background", True), (BY_THREADS, True), ("foreground", False)):
        if kind == BY_THREADS:
            torch._C._accelerator_setAllocatorSettings(
                "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
            )
        saver = Saver(folder / kind, settings, None, background, 600)
        for turn in ("first", "second"):
            if time.monotonic() > until - 15 and not setting.dry:
                yield {"case": f"{kind}, {turn}", "skipped": "no time left"}
                continue
            number += 1
            began = time.perf_counter()
            saver.save([trained.engine], TrainState(step=number), 1)
            beside, first = [], step()
            while saver.writing and time.monotonic() < until:
                beside.append(step())
            saver.wait()
            seconds, stalled = time.perf_counter() - began, saver.stalled
            if saver.failed:
                yield {"case": f"{kind}, {turn}", "failed": saver.failed}
                continue
            size = sum(path.stat().st_size for path in (folder / kind).rglob("*") if path.is_file()) / 1e9
            yield {
                "case": f"{kind}, {turn}", "stall_s": stalled, "first_step_s": first, "until_written_s": seconds,
                "gb": size, "gb_per_s": size / seconds,
                "steps_beside": len(beside), "slower": statistics.median(beside) / usual if beside else None,
            }  # fmt: skip
        del saver
        shutil.rmtree(folder, ignore_errors=True)
    trained.close()


def data(setting: Setting) -> Iterator[Row]:
    """Tokens per second that the reader delivers, beside those that a model of 10^9 parameters consumes."""
    from configs.sections.data import DataConfig
    from models.planning.devices import DEVICES
    from models.planning.plan import predict
    from trainer.data.read.loader import Loader
    from trainer.data.read.reader import Dataset
    from trainer.step import micro_batches

    config = large_config(setting)
    length, size = config.train.seq_len, config.train.micro_batch
    prepared = DataConfig(path=str(data_folder(setting, 200_000 if setting.dry else 3_000_000)))
    seconds = 0.5 if setting.dry else 3.0
    wanted = predict(config, DEVICES["h100"]).tokens_per_second
    dataset = Dataset(prepared, length, 0)
    batches = micro_batches(config, 0, 0)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        dataset.examples(next(batches))
        count += 1
    rate = count * size * length / (time.perf_counter() - began)
    yield {"case": "Dataset.batch alone", "tokens_per_s": rate, "a_model_takes": wanted, "times": rate / wanted}
    for pace in (0.0, size * length / wanted):
        here = torch.device(setting.device)
        with Loader(Dataset(prepared, length, 0), micro_batches(config, 0, 0), 4, here) as loader:
            next(loader)
            began, waited, count = time.perf_counter(), loader.waited, 0
            while time.perf_counter() - began < seconds:
                next(loader)
                time.sleep(pace)
                count += 1
            took = time.perf_counter() - began
            rate = count * size * length / took
            yield {
                "case": "Loader at a model's pace" if pace else "Loader, to the device", "tokens_per_s": rate,
                "a_model_takes": wanted, "times": rate / wanted, "data_wait_share": (loader.waited - waited) / took,
            }  # fmt: skip


PARTS: Sequence[Part] = [
    Part("around.resume", resume, 60, alone=False),
    Part("around.warm", warm, 45, alone=False),
    Part("around.start", start, 60),
    Part("around.checkpoint", checkpoint, 60),
    Part("around.data", data, 12),
]

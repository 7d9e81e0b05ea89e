"""Speed of training on the device: whole steps with each switch on and off, and where their time goes."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import Part, Row, Setting
from .pieces import attention, loss, matmul, optimizer
from .rig import Rig, Way, attempt, flops_per_token, peak, race, run_config


def loss_in_fp8(setting: Setting) -> Iterator[Row]:
    """300 steps on Python's own sources in bf16 and in fp8, the same batches: the mean loss of the last 20."""
    import os
    from pathlib import Path

    from models.batch import Batch

    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    steps, last = (6, 2) if setting.dry else (300, 20)
    found: dict[str, float] = {}
    for switches in ((), ("fp8 tensorwise",), ("fp8 rowwise",)):
        rig = Rig(Way(size="small", switches=switches), setting, 2 if setting.dry else 4, 1)
        rows, length = rig.rows, rig.config.train.seq_len
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(setting.device)
        generator = torch.Generator().manual_seed(1)
        places = torch.arange(length, device=setting.device).expand(rows, length)
        ids = torch.arange(rows, device=setting.device)

        def batch() -> Any:
            starts = torch.randint(0, len(tokens) - length - 1, (rows, 1), generator=generator)  # noqa: B023
            read = tokens[(starts + torch.arange(length + 1)).to(setting.device)].long()  # noqa: B023
            return Batch(read[:, :-1].contiguous(), read[:, 1:].contiguous(), places, None, ids)  # noqa: B023

        rig.next = batch  # type: ignore[method-assign]
        losses = [rig.step() for _ in range(steps)]
        name = switches[0] if switches else "bf16"
        found[name] = torch.stack(losses[-last:]).mean().item()
        rig.close()
        difference = found[name] - found["bf16"]
        yield {
            "check": f"{name}: loss after {steps} steps", "ok": abs(difference) < 0.02, "loss": found[name],
            "error": difference, "allowed": 0.02,
        }  # fmt: skip


def largest(size: str) -> Callable[[Setting], Iterator[Row]]:
    """Tokens/s by micro-batch, until memory is full."""

    def run(setting: Setting) -> Iterator[Row]:
        for rows in (1, 2) if setting.dry else (8, 16, 24, 32, 48):
            row = attempt(Way(size=size), setting, rows, accumulate=1, steps=2)
            yield row
            if "not_run" in row:
                return

    return run


def profile(way: Way, rows: int) -> Callable[[Setting], Iterator[Row]]:
    """Kernels by name, the device's idle time and host syncs, in two steps."""

    def run(setting: Setting) -> Iterator[Row]:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as record

        rig = Rig(way, setting, 2 if setting.dry else rows, 1)
        for _ in range(3):
            rig.step()
        cuda = setting.device == "cuda"
        if cuda:
            torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
            for _ in range(2):
                rig.step()
            if cuda:
                torch.cuda.synchronize()
        events = seen.events()
        kernels = [e for e in events if e.device_type == DeviceType.CUDA] if cuda else []
        rig.close()
        if not kernels:
            yield {"way": way.name, "events": len(events)}
            return
        spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
        busy, end, gaps = 0.0, spans[0][0], []
        for begin, until in spans:
            if begin > end:
                gaps.append(begin - end)
            busy += max(0.0, until - max(begin, end))
            end = max(end, until)
        whole = end - spans[0][0]
        calls = (
            "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync",
            "cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC",
        )  # fmt: skip
        yield {
            "size": way.size, "way": way.name, "step_ms": whole / 2e3, "busy": busy / whole,
            "gaps_over_20us": sum(g > 20 for g in gaps) / 2, "gap_ms": sum(gaps) / 2e3, "kernels": len(kernels) / 2,
            **{call: sum(e.name == call for e in events) / 2 for call in calls},
        }  # fmt: skip
        by_name: dict[str, list[float]] = {}
        for e in kernels:
            by_name.setdefault(e.name, []).append(e.time_range.end - e.time_range.start)
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]:
            yield {"kernel": name[:110], "ms": sum(times) / 2e3, "share": sum(times) / whole, "calls": len(times) / 2}

    return run


def trainer(size: str, rows: int, accumulate: int, steps: int = 7, **train: Any) -> Callable[[Setting], Iterator[Row]]:
    """The whole trainer, `python -m trainer`, on tokens of Python's own sources, measured from its record."""

    def run(setting: Setting) -> Iterator[Row]:
        import json
        import subprocess
        import sys
        import time

        import yaml
        from throughput import prepared_data

        from .around import environment

        few = (2, 2, 6) if setting.dry else (rows, accumulate, steps)
        config = run_config(size, setting, *few[:2])
        tree = {
            "run": {"name": "fast", "root": str(setting.folder)},
            "model": config.model.model_dump(mode="json", exclude_none=True),
            "train": {
                "steps": 1000, "global_batch": few[0] * few[1], "micro_batch": few[0], "precision": "bf16",
                "seq_len": config.train.seq_len, "sample_tokens": 0, "eval_sequences": few[0], "compile": True,
            } | train,
            "data": {"path": str(prepared_data(setting.folder)), "document_mask": False},
            "checkpoint": {"every": 0}, "tracking": {"enabled": False},
        }  # fmt: skip
        path, metrics = setting.folder / "config.yaml", setting.folder / "fast" / "metrics.jsonl"
        path.write_text(yaml.safe_dump(tree))
        start = time.perf_counter()
        lines: list[dict[str, Any]] = []
        with (setting.folder / "log").open("wb") as log:
            command = [sys.executable, "-m", "trainer", str(path)]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(setting))
            try:
                # Killed before the last checkpoint, which fills a disk for such a model.
                while len(lines) < few[2] and process.poll() is None and time.perf_counter() - start < setting.seconds:
                    time.sleep(0.05)
                    with contextlib.suppress(OSError, ValueError):
                        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            finally:
                process.kill()
                process.wait()
        whole = time.perf_counter() - start
        if len(lines) < few[2]:
            raise RuntimeError((setting.folder / "log").read_text(errors="replace")[-800:])
        steady = [line for line in lines if "loss" in line][3:]
        exact, palm = flops_per_token(config)
        rate = statistics.median(line["tokens_per_second"] for line in steady)
        yield {
            "size": size, "micro_batch": few[0], "accumulate": few[1], "tokens_per_second": rate,
            "mfu": exact * rate / peak(setting), "mfu_palm": palm * rate / peak(setting),
            "recorded_mfu": steady[-1].get("mfu"), "step_s": steady[-1]["step_time"],
            "data_wait_s": statistics.median(line["data_wait"] for line in steady),
            "memory_gb": steady[-1]["memory_gb"], "first_step_s": lines[0]["step_time"], "whole_s": whole,
            "loss": steady[-1]["loss"],
        }  # fmt: skip

    return run


DENSE, BIG, MOE = Way(), Way(size="dense-3b"), Way(size="moe-1b")

PARTS = [
    Part("fast.matmul", matmul, 4),
    Part("fast.dense", race([(DENSE, 16)], accumulate=4), 20),
    Part("fast.eager.dense", race([(Way(compiled=False), 16)], accumulate=4), 15),
    Part("fast.moe", race([(MOE, 12)], accumulate=5), 30),
    Part("fast.moe.small", race([(MOE, 8)], accumulate=8), 30),
    Part("fast.big", race([(BIG, 8)], accumulate=4), 25),
    Part("fast.fp8", race([
        (Way(size="dense-3b", switches=("fp8 rowwise",)), 8), (Way(size="dense-3b", switches=("fp8 tensorwise",)), 8),
    ], accumulate=4), 50),
    Part("fast.loss_in_fp8", loss_in_fp8, 60, alone=False),
    Part("fast.trainer.moe", trainer("moe-1b", 8, 8), 50),
    Part("fast.trainer.dense", trainer("dense-3b", 8, 4), 40),
    Part("fast.trainer.fp8", trainer("dense-3b", 8, 4, precision="fp8"), 45),
    Part("fast.transformers", race([
        (Way(by="transformers", compiled=False), 8), (Way(by="transformers"), 8),
        (Way(by="transformers", size="moe-1b", compiled=False), 4),
    ], accumulate=4), 50),
    Part("fast.loss", loss, 12),
    Part("fast.profile.moe", profile(MOE, 8), 15),
    Part("fast.profile.dense", profile(BIG, 8), 15),
    Part("fast.recompute", race([
        (Way(size="moe-1b", switches=("recompute by op, budget 0.8",)), 12), (Way(recompute="full"), 32),
    ], accumulate=4), 45),
    Part("fast.zero", race([(Way(size="moe-1b", stage=1), 8), (Way(stage=1), 16)], accumulate=8), 45),
    Part("fast.sums", race([(Way(size="moe-1b", switches=("plain sums",)), 8)], accumulate=8), 25),
    Part("fast.bare", race([(Way(by="bare"), 16)], accumulate=4), 20),
    Part("fast.documents", race([(Way(documents=True), 16)], accumulate=4), 25),
    Part("fast.optimizer", optimizer, 8),
    Part("fast.attention", attention, 60),
    Part("fast.eager.moe", race([(Way(size="moe-1b", compiled=False), 4)], accumulate=8), 30),
    Part("fast.rows.dense", largest("dense-1b"), 50),
    Part("fast.rows.moe", largest("moe-1b"), 60),
]  # fmt: skip

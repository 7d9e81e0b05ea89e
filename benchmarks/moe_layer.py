"""One MoE layer, forward and backward: ours, transformers' Qwen3-MoE block, DeepSpeed's MoE, and a dense SwiGLU.

Every contestant is a process of its own with SwiGLU experts of the same size; they take turns, one step each on new
tokens, so that noise of the machine affects all of them. The first E channels of a token are its router logits (the
gate is an identity matrix): log p + Gumbel noise, so that experts are drawn from p, even or Zipf's, the same for all.
The dense layer is as wide as the k experts of a token. "products alone" are torch's batched products of even loads,
without router and dispatch: the cost if all else were free.
Run: `python benchmarks/moe_layer.py [--json FILE]`, on a GPU if there is one.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

CONTESTANTS = [
    "muster", "transformers grouped_mm", "transformers eager", "transformers grouped_mm, autocast",
    "transformers eager, autocast", "transformers batched_mm", "deepspeed", "deepspeed, capacity 1", "dense",
    "products alone",
]  # fmt: skip
GPU_ONLY = ["transformers sonicmoe", "transformers deepgemm"]
HOPELESS = 10
"""Multiple of the fastest contestant's time above which a contestant is left out of the following cells."""
MOST_ROUNDS = 16
"""The first half of them is warm-up: oneDNN compiles a kernel for every new shape of a bf16 product."""


class Cell(NamedTuple):
    """One layer with one load; `hidden` is the model's width, `width` an expert's."""

    precision: str
    tokens: int
    experts: int
    top_k: int
    load: str
    hidden: int
    width: int


def inputs(cell: Cell, seed: int) -> Any:
    """[S, H] fp32 on the CPU; see above."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cell.tokens, cell.hidden, generator=generator)
    rank = torch.randperm(cell.experts, generator=torch.Generator().manual_seed(0)) + 1.0
    share = torch.ones(cell.experts) if cell.load == "even" else 1 / rank
    uniform = torch.rand(cell.tokens, cell.experts, generator=generator).clamp(1e-6, 1 - 1e-6)
    x[:, : cell.experts] = share.log() - (-uniform.log()).log()
    return x


def our_layer(cell: Cell) -> Any:
    import torch

    from configs import from_dict, resolve
    from models.moe.block import MoE
    from models.moe.router import Chooser

    model = {
        "num_layers": 1, "hidden_size": cell.hidden, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64,
        "vocab_size": 256, "num_experts": cell.experts, "top_k": cell.top_k, "expert_size": cell.width,
    }  # fmt: skip
    config = resolve(from_dict({"model": model}))[0].model
    layer = MoE(config, cell.width, Chooser(config, 0))
    layer.chooser.prepare(torch.zeros(1, cell.tokens, dtype=torch.long), None, True)
    return layer


def hugging_face(cell: Cell, implementation: str) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=cell.hidden, moe_intermediate_size=cell.width, num_experts=cell.experts,
        num_experts_per_tok=cell.top_k, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(config)


def deepspeed_layer(cell: Cell, drop: bool) -> Any:
    import deepspeed
    from torch import nn

    from models.decoder.layers import SwiGLU
    from trainer.engine.start import start_processes

    deepspeed.logger.setLevel("ERROR")
    start_processes(600)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = SwiGLU(cell.hidden, cell.width)
            self.moe = deepspeed.moe.layer.MoE(
                cell.hidden, expert, cell.experts, k=cell.top_k, capacity_factor=1.0, drop_tokens=drop,
                top2_2nd_expert_sampling=False,
            )  # fmt: skip
            with contextlib.redirect_stdout(sys.stderr):
                self.moe.set_deepspeed_parallelism()

        def forward(self, x: Any) -> Any:
            return self.moe(x)[0]

    return First()


def products_alone(cell: Cell) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.empty(cell.experts, 2 * cell.width, cell.hidden))
            self.down = nn.Parameter(torch.empty(cell.experts, cell.hidden, cell.width))

        def forward(self, x: Any) -> Any:
            x_ERH = x.expand(cell.top_k, -1, -1).reshape(cell.experts, -1, cell.hidden)
            gate, up = torch.bmm(x_ERH, self.gate_up.mT).chunk(2, dim=-1)
            y_ERH = torch.bmm(F.silu(gate) * up, self.down.mT)
            return y_ERH.view(cell.top_k, cell.tokens, cell.hidden).sum(0)[None]

    return Products()


def layer_for(name: str, cell: Cell) -> Any:
    from models.decoder.layers import SwiGLU

    kind, _, rest = name.partition(" ")
    if kind == "transformers":
        return hugging_face(cell, rest.removesuffix(", autocast"))
    if name.startswith("deepspeed"):
        return deepspeed_layer(cell, drop="capacity" in name)
    if name == "products alone":
        return products_alone(cell)
    return our_layer(cell) if name == "muster" else SwiGLU(cell.hidden, cell.width * cell.top_k)


def why_not(name: str, cell: Cell) -> str | None:
    """The reason not to try a contestant: work or memory out of all proportion, known from the load alone."""
    import torch

    size = 2 if cell.precision == "bf16" else 4
    assignments = cell.tokens * cell.top_k
    if name == "deepspeed":  # pads every expert to the fullest one's rows
        x = inputs(cell, 0)[:, : cell.experts]
        rows = cell.experts * int(torch.bincount(x.topk(cell.top_k).indices.flatten()).max())
        memory = rows * 4 * (cell.hidden + cell.width) * size
        if rows > 8 * assignments or memory > 6e9:
            return f"pads to {rows / assignments:.1f} times the rows"
    if name == "transformers batched_mm":  # copies the weights for every assignment, and their gradients
        memory = 2 * assignments * 3 * cell.hidden * cell.width * size
        if memory > 4e9:
            return f"copies {memory / 1e9:.1f} GB of weights"
    return None


class Memory:
    """Peak memory of this process above what it held when this object was created, in MB."""

    def __init__(self) -> None:
        import torch

        gc.collect()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 1e6
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
            self.before = self._resident("VmRSS")

    def peak(self) -> float:
        import torch

        return (torch.cuda.max_memory_allocated() / 1e6 if self.cuda else self._resident("VmHWM")) - self.before

    @staticmethod
    def _resident(key: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024 / 1e6


def prepare(name: str, cell: Cell, clock: Callable[[], float]) -> Callable[[int], float]:
    """The layer of one cell. Returns a function from a seed to the seconds of a step."""
    import torch

    from trainer.processes.device import device

    autocast = name.endswith("autocast")
    dtype = torch.bfloat16 if cell.precision == "bf16" and not autocast else torch.float32
    torch.manual_seed(0)
    layer = layer_for(name, cell).to(device(), dtype)
    for parameter_name, parameter in layer.named_parameters():
        if parameter_name.endswith(("gate.weight", "wg.weight")) and len(parameter) == cell.experts:
            torch.nn.init.eye_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    context = torch.autocast(device().type, torch.bfloat16) if autocast else contextlib.nullcontext()
    dy = torch.randn(1, cell.tokens, cell.hidden).to(device(), torch.bfloat16 if cell.precision == "bf16" else dtype)

    def wait() -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()

    def step(seed: int) -> float:
        x = inputs(cell, seed)[None].to(device(), dtype).requires_grad_()
        wait()
        start = clock()
        with context:
            y = layer(x)
        y.backward(dy.to(y.dtype))
        wait()
        seconds = clock() - start
        assert x.grad is not None
        layer.zero_grad()
        return seconds

    return step


def serve(name: str, threads: int, cpu_time: bool, pipe: Any) -> None:
    """A contestant's process. Given a cell, it answers (seconds of the first step, peak MB) or why it does not run;
    given a seed, the seconds of a step."""
    import torch

    from trainer.processes.device import device, keep_freed_memory

    torch.set_num_threads(threads)
    if device().type == "cpu":
        keep_freed_memory()  # for every contestant alike
    clock = time.process_time if cpu_time else time.perf_counter
    ready: set[str] = set()
    step: Callable[[int], float] | None = None
    while (told := pipe.recv()) is not None:
        if isinstance(told, int):
            assert step is not None
            pipe.send(step(told))
            continue
        step = None
        reason = why_not(name, told)
        if reason is None:
            try:
                if told.precision not in ready:  # memory of libraries and their workspaces does not count
                    prepare(name, told._replace(tokens=64, experts=8, load="even"), clock)(0)
                    ready.add(told.precision)
                if device().type == "cuda":
                    prepare(name, told, clock)(0)  # compiles and tunes what is needed once
                memory = Memory()
                step = prepare(name, told, clock)
                pipe.send((step(0), memory.peak()))
                continue
            except Exception as error:
                step, reason = None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
        pipe.send(reason)


def kind_of(name: str) -> str:
    return "transformers" if name.startswith("transformers") else name


def compete(cell: Cell, pipes: dict[str, Any], out: set[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Run all contestants in turn for about this many seconds, at least once beside the step that measures memory.
    Names of those that are far too slow are added to `out`."""
    rows: dict[str, dict[str, Any]] = {}
    best: dict[str, float] = {}
    for name, pipe in pipes.items():
        if name in out:
            continue
        pipe.send(cell)
        answer = pipe.recv()
        if isinstance(answer, str):
            rows[name] = {"reason": answer}
            print(f"{cell}: {name}: {answer}", file=sys.stderr)
            continue
        first, memory = answer
        rows[name] = {"times": [first], "memory_mb": memory}
        best[kind_of(name)] = min(first, best.get(kind_of(name), first))
        if first > HOPELESS * best[kind_of(name)]:
            out.add(name)
            print(f"{cell}: {name}: {first:.2f} s, left out from now on", file=sys.stderr)
    running = [name for name, row in rows.items() if "times" in row and name not in out]
    rounds, number, spent = MOST_ROUNDS, 0, 0.0
    while number < rounds:
        number += 1
        for name in running:
            pipes[name].send(number)
            rows[name]["times"].append(pipes[name].recv())
            spent += rows[name]["times"][-1]
        rounds = min(rounds, int(seconds / (spent / number)))
    for name in running:
        rows[name]["seconds"] = statistics.median(rows[name]["times"][(number + 1) // 2 :])
    return rows


HEADER = (
    "| experts | k | load | muster, ms | x transformers | its best | x DeepSpeed | x DeepSpeed, capacity 1 | x dense "
    "| x products alone | memory, MB: muster | transformers | DeepSpeed | capacity 1 | dense |"
)


def table_line(cell: Cell, rows: dict[str, dict[str, Any]]) -> str:
    """Ratios above 1: ours is faster."""
    mine = rows["muster"]["seconds"]
    peers = {n: r["seconds"] for n, r in rows.items() if kind_of(n) == "transformers" and "seconds" in r}
    best = min(peers, key=peers.__getitem__) if peers else ""

    def ratio(name: str) -> str:
        return f"{rows[name]['seconds'] / mine:.2f}" if "seconds" in rows.get(name, ()) else "-"

    def memory(name: str) -> str:
        return f"{rows[name]['memory_mb']:.0f}" if "memory_mb" in rows.get(name, ()) else "-"

    columns = [
        cell.experts, cell.top_k, cell.load, f"{mine * 1e3:.1f}", ratio(best), best.removeprefix("transformers "),
        ratio("deepspeed"), ratio("deepspeed, capacity 1"), ratio("dense"), ratio("products alone"),
        memory("muster"), memory(best), memory("deepspeed"), memory("deepspeed, capacity 1"), memory("dense"),
    ]  # fmt: skip
    return "| " + " | ".join(str(c) for c in columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="*", choices=["fp32", "bf16"], help="default: both, on a GPU bf16")
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 16384])
    parser.add_argument("--experts", nargs="*", type=int, default=[8, 64, 128])
    parser.add_argument("--top-k", nargs="*", type=int, default=[1, 2, 8])
    parser.add_argument("--load", nargs="*", choices=["even", "zipf"], default=["even", "zipf"])
    parser.add_argument("--hidden", type=int, help="default: 512, on a GPU 2048")
    parser.add_argument("--width", type=int, help="of an expert; default: 256, on a GPU 768")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each cell, without first steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time, not the wall clock's, for a shared machine"
    )
    parser.add_argument("--only", nargs="*", help="contestants whose name starts with one of these, and muster")
    parser.add_argument("--json", type=Path, help="write one line per cell to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for every contestant; why: trainer/__init__.py
    import torch

    cuda = torch.cuda.is_available()
    precisions = args.precision or (["bf16"] if cuda else ["fp32", "bf16"])
    sizes = (args.hidden or (2048 if cuda else 512), args.width or (768 if cuda else 256))
    names = [n for n in CONTESTANTS + GPU_ONLY * cuda if not args.only or n.startswith(("muster", *args.only))]
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, args.threads, args.cpu_time, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    print(f"hidden {sizes[0]}, experts of {sizes[1]}, {args.threads} threads; ratios above 1: muster is faster")
    lines = args.json.open("w") if args.json else None
    for precision, tokens in itertools.product(precisions, args.tokens):
        out = {name for name in names if name.endswith("autocast") and precision == "fp32"}
        print(f"\n{precision}, {tokens} tokens:\n\n{HEADER}\n{'|---' * (HEADER.count('|') - 1)}|", flush=True)
        for experts, top_k, load in itertools.product(args.experts, args.top_k, args.load):
            cell = Cell(precision, tokens, experts, top_k, load, *sizes)
            rows = compete(cell, pipes, out, args.seconds)
            print(table_line(cell, rows), flush=True)
            if lines:
                lines.write(json.dumps(cell._asdict() | {"rows": rows}) + "\n")
                lines.flush()
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(10)
        process.kill()


if __name__ == "__main__":
    main()

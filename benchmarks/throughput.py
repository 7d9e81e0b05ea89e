"""Tokens/s and peak memory: muster, transformers' Qwen3-MoE and bare loops, side by side in one run.

Every contestant is a process of its own that trains the same architecture on the same batch sizes with fp32 master
weights and fused AdamW. They take turns, a few steps each, so that noise of the machine affects all of them; ratios are
taken turn by turn. Run: `python benchmarks/throughput.py` (CPU sizes), `--gpu dense-1b` or `--gpu moe-1b` on a GPU.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32,
                  "num_experts": 16, "expert_size": 256, "top_k": 2, "vocab_size": 4096},
        "batch": 8, "seq_len": 256, "steps": 4,
    },
    "dense-1b": {
        "model": {"num_layers": 16, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128,
                  "intermediate_size": 8192, "num_experts": 0, "vocab_size": 32768},
        "batch": 8, "seq_len": 2048, "steps": 5,
    },
    "moe-1b": {
        "model": {"num_layers": 16, "hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128,
                  "num_experts": 16, "expert_size": 4096, "top_k": 2, "vocab_size": 32768},
        "batch": 4, "seq_len": 2048, "steps": 5,
    },
}  # fmt: skip


def run_config(size: dict[str, Any], precision: str, compiled: bool, **sections: Any) -> Any:
    from configs import from_dict, resolve

    tree = {
        "model": size["model"],
        "train": {"global_batch": size["batch"], "micro_batch": size["batch"], "seq_len": size["seq_len"],
                  "precision": precision, "sample_tokens": 0, "eval_sequences": 8, "steps": 10**6,
                  "compile": compiled},
        "data": {"document_mask": False},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 0},
    }  # fmt: skip
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return resolve(from_dict(tree))[0]


class MasterWeights:
    """AdamW over fp32 copies of low-precision weights, as in a plain mixed-precision loop."""

    def __init__(self, parameters: list, lr: float):
        import torch

        self.low = parameters
        self.high = [p.detach().float().clone().requires_grad_() for p in parameters]
        self.adam = torch.optim.AdamW(self.high, lr=lr, fused=True)

    def step(self, clip: float) -> None:
        import torch

        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.low]
        for high, grad in zip(self.high, grads, strict=True):
            high.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(self.high, clip, foreach=True)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.low, self.high)
        for low in self.low:
            low.grad = None


def optimizer_for(module: Any, master: bool) -> Callable[[], None]:
    import torch

    parameters = list(module.parameters())
    if master:
        weights = MasterWeights(parameters, 1e-4)
        return lambda: weights.step(1.0)
    adam = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        adam.step()
        adam.zero_grad()

    return step


def hugging_face(size: dict[str, Any], precision: str, experts: str, autocast: bool = False) -> Callable[[], None]:
    """transformers' model in a plain loop. Returns a function that takes one step."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from trainer.processes.device import device

    model = size["model"]
    common = {
        "vocab_size": model["vocab_size"], "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["num_layers"], "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"], "head_dim": model["head_dim"],
        "max_position_embeddings": size["seq_len"], "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    with device():
        if model["num_experts"]:
            config = Qwen3MoeConfig(
                **common, num_experts=model["num_experts"], num_experts_per_tok=model["top_k"],
                moe_intermediate_size=model["expert_size"], decoder_sparse_step=1, norm_topk_prob=True,
                output_router_logits=True,
            )  # fmt: skip
            config._experts_implementation = experts
            config._attn_implementation = "sdpa"
            module = Qwen3MoeForCausalLM(config)
        else:
            config = Qwen3Config(**common, intermediate_size=model["intermediate_size"])
            config._attn_implementation = "sdpa"
            module = Qwen3ForCausalLM(config)
    master = precision == "bf16" and not autocast
    if master:
        module = module.to(torch.bfloat16)
    update = optimizer_for(module, master)
    context = torch.autocast(device().type, torch.bfloat16) if autocast else contextlib.nullcontext()

    def step() -> None:
        ids = random_batch(size).to(device()).input_ids
        with context:
            loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        update()
        loss.item()

    return step


def our_model(config: Any) -> tuple[Any, Any]:
    """(module on this process's device, tap on its routers or None), compiled if the config says so."""
    from models.families import build
    from models.moe.balance import RouterTap
    from trainer.processes.device import device

    with device():
        module = build(config.model)
    module.init_weights(0)
    tap = RouterTap(module, config.model) if config.model.is_moe else None
    if config.train.compile:
        for layer in module.model.layers:
            layer.compile(dynamic=False)
    return module, tap


def objective(out: Any, tap: Any) -> Any:
    """Mean token loss and the router losses of one forward pass, as the trainer weighs them."""
    loss = out.loss_sum / out.tokens
    if tap:
        router = tap.collect()
        loss = loss + 0.01 * router.aux_loss + 0.001 * router.z_loss
    return loss


def bare(size: dict[str, Any], precision: str, compiled: bool) -> Callable[[], None]:
    """Our own model in a bare PyTorch loop."""
    import torch

    from trainer.processes.device import device

    module, tap = our_model(run_config(size, precision, compiled))
    if precision == "bf16":
        module = module.to(torch.bfloat16)
    update = optimizer_for(module, precision == "bf16")

    def step() -> None:
        out = module(random_batch(size).to(device()))
        loss = objective(out, tap)
        loss.backward()
        update()
        loss.item()

    return step


def random_batch(size: dict[str, Any]) -> Any:
    """New tokens at every step, as in training: expert loads never repeat, so oneDNN compiles a bf16 kernel for every
    new shape, which a repeated batch would hide."""
    import torch

    from models.batch import Batch

    rows, length = size["batch"], size["seq_len"]
    ids = torch.randint(0, size["model"]["vocab_size"], (rows, length + 1))
    positions = torch.arange(length).expand(rows, length)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, None, torch.arange(rows))


def engine_loop(size: dict[str, Any], precision: str, compiled: bool, stage: int) -> Callable[[], None]:
    """A bare loop over the same DeepSpeed engine that the trainer uses."""
    from trainer.engine.engine import Engine
    from trainer.engine.start import start_processes
    from trainer.processes.device import device

    config = run_config(size, precision, compiled, parallel={"zero_stage": stage})
    start_processes(600)
    module, tap = our_model(config)
    engine = Engine(module, config)

    def step() -> None:
        out = engine(random_batch(size).to(device()))
        loss = objective(out, tap)
        engine.backward(loss)
        engine.step()
        loss.item()

    return step


def serve_trainer(size: dict[str, Any], precision: str, compiled: bool, stage: int, pipe: Any, folder: str) -> None:
    """The whole trainer on real Parquet data, made to wait before each turn."""
    from trainer import loop
    from trainer.run.folder import prepare_run
    from trainer.trainee import Trainee

    data = prepared_data(Path(folder))
    config = run_config(
        size, precision, compiled, parallel={"zero_stage": stage}, data={"path": str(data), "document_mask": False},
        run={"name": f"trainer-{precision}-{stage}-{compiled}", "root": folder},
    )  # fmt: skip
    run_dir = prepare_run(config)
    original = Trainee.set_learning_rate
    left, start = 0, 0.0

    def gate(*arguments: Any) -> float:
        nonlocal left, start
        if left == 0:
            if start:
                pipe.send((time.perf_counter() - start, peak_memory()))
            left = pipe.recv()
            if left is None:
                os._exit(0)
            start = time.perf_counter()
        left -= 1
        return original(*arguments)

    Trainee.set_learning_rate = gate  # type: ignore[assignment, method-assign]
    loop.train(run_dir)


def prepared_data(folder: Path) -> Path:
    from configs.sections.data import PrepareConfig
    from trainer.data.prepare.prepare import prepare

    source = Path(importlib.util.find_spec("asyncio").origin).parent  # type: ignore[union-attr,arg-type]
    out = folder / "data"
    if not out.exists():
        prepare([str(source)], out, PrepareConfig(tokenizer="bytes"), workers=1, progress=False)
    return out


def peak_memory() -> float:
    """Peak of this process in 10^9 bytes: allocated device memory on a GPU, resident memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(kind: str, arguments: dict[str, Any], size: dict[str, Any], threads: int, pipe: Any) -> None:
    """A contestant's process: build, then take as many steps as it is told, and answer with the seconds."""
    import torch

    from trainer.processes.device import keep_freed_memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()  # for every contestant alike
    if kind == "trainer":
        return serve_trainer(size, pipe=pipe, **arguments)
    builders = {"transformers": hugging_face, "bare": bare, "engine": engine_loop}
    step = builders[kind](size, **arguments)  # type: ignore[operator]
    while (count := pipe.recv()) is not None:
        start = time.perf_counter()
        for _ in range(count):
            step()
        pipe.send((time.perf_counter() - start, peak_memory()))
    return None


def matmul_peak(threads: int, pipe: Any) -> None:
    """Matrix-product rate in FLOP/s, fp32 and bf16, best of several."""
    import torch

    torch.set_num_threads(threads)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if where == "cuda" else 2048
    rates = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(6):
            if where == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            a @ b
            if where == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        rates[name] = 2 * n**3 / best
    pipe.send(rates)


def contestants(size: dict[str, Any], precision: str, compiled: bool, folder: str) -> dict[str, tuple[str, dict]]:
    found: dict[str, tuple[str, dict]] = {}
    implementations = ["grouped_mm", "eager", "batched_mm"] if size["model"]["num_experts"] else ["eager"]
    for name in implementations:
        found[f"transformers {name}"] = ("transformers", {"precision": precision, "experts": name})
    if precision == "bf16":
        best = "grouped_mm" if size["model"]["num_experts"] else "eager"
        found["transformers autocast"] = (
            "transformers", {"precision": precision, "experts": best, "autocast": True},
        )  # fmt: skip
    found["bare loop, our model"] = ("bare", {"precision": precision, "compiled": False})
    if compiled:
        found["bare loop, our model, compiled"] = ("bare", {"precision": precision, "compiled": True})
    for s in (0, 1, 3):
        found[f"engine loop, ZeRO-{s}"] = ("engine", {"precision": precision, "compiled": False, "stage": s})
    settings = {"precision": precision, "compiled": False, "stage": 0, "folder": folder}
    found["muster, ZeRO-0"] = ("trainer", settings)
    if compiled:
        found["muster, ZeRO-0, compiled"] = ("trainer", settings | {"compiled": True})
    return found


def compete(size, precision, args, peak: float, folder: str) -> dict[str, Any]:
    from models.planning.cost import training_flops_per_token

    context = multiprocessing.get_context("spawn")
    tokens = size["batch"] * size["seq_len"] * size["steps"]
    flops = training_flops_per_token(run_config(size, precision, False).model, size["seq_len"])
    running, slowest_allowed = {}, float("inf")
    for name, (kind, arguments) in contestants(size, precision, args.compile, folder).items():
        if args.only and not any(word in name for word in args.only):
            continue
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(kind, arguments, size, args.threads, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            mine.send(1)  # warm-up, one contestant at a time: compilation and first allocations
            mine.recv()
            mine.send(1)
            seconds, _ = mine.recv()
            if name.startswith("transformers") and seconds > 4 * slowest_allowed:
                print(f"{name}: {size['batch'] * size['seq_len'] / seconds:.0f} tokens/s, left out", file=sys.stderr)
                process.kill()
                continue
            slowest_allowed = min(slowest_allowed, seconds)
            running[name] = (process, mine)
        except (EOFError, BrokenPipeError):
            print(f"{name}: did not run", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in running}
    memory: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, (_, pipe) in running.items():
            pipe.send(size["steps"])
            seconds, memory[name] = pipe.recv()
            rates[name].append(tokens / seconds)
    for process, pipe in running.values():
        pipe.send(None)
        process.join(10)
        process.kill()
    peers = {name: statistics.median(r) for name, r in rates.items() if name.startswith("transformers")}
    best = max(peers, key=peers.__getitem__) if peers else None
    rows = {}
    chain = ["muster, ZeRO-0", "engine loop, ZeRO-0", "bare loop, our model"]
    overheads = {
        f"{above} / {below}": statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))
        for i, above in enumerate(chain) for below in chain[i + 1 :] if above in rates and below in rates
    }  # fmt: skip
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[best], strict=True)] if best else [float("nan")]
        rate = statistics.median(values)
        rows[name] = {
            "tokens_per_second": rate, "low": min(values), "high": max(values), "times_best_transformers":
            statistics.median(ratios), "share_of_matmul_peak": rate * flops / peak, "peak_memory_gb": memory[name],
        }  # fmt: skip
    return {
        "precision": precision,
        "best_transformers": best,
        "matmul_peak_gflops": peak / 1e9,
        "rows": rows,
        "overheads": overheads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", choices=["dense-1b", "moe-1b"], help="a size for a GPU instead of the CPU's")
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="our model compiled layer by layer as well")
    parser.add_argument("--only", nargs="*", help="contestants whose name contains one of these")
    args = parser.parse_args()
    size = SIZES[args.gpu or "cpu"]
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for every contestant; why: trainer/__init__.py
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    context.Process(target=matmul_peak, args=(args.threads, theirs)).start()
    peaks = mine.recv()
    print(json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "size": size}))
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as folder:
            result = compete(size, precision, args, peaks[precision], folder)
        print(f"\n{precision}: matmul peak {result['matmul_peak_gflops']:.0f} GFLOP/s\n")
        print("| contestant | tokens/s (min to max) | x best transformers | of matmul peak | peak memory |")
        print("|---|---|---|---|---|")
        for name, row in result["rows"].items():
            print(
                f"| {name} | {row['tokens_per_second']:.0f} ({row['low']:.0f} to {row['high']:.0f}) "
                f"| {row['times_best_transformers']:.2f} | {row['share_of_matmul_peak']:.1%} "
                f"| {row['peak_memory_gb']:.2f} GB |",
                flush=True,
            )
        for pair, ratio in result["overheads"].items():
            print(f"{pair}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()

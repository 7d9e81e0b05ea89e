"""Tools for timing training: model sizes, ways to take a step, the clock, and comparisons between ways."""

import gc
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.engine import precision
from trainer.record.measure import peak_flops

from . import Row, Setting

HEADS = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
SIZES: dict[str, dict[str, Any]] = {
    "dense-1b": {"num_layers": 24, "hidden_size": 2048, **HEADS, "intermediate_size": 4096, "num_experts": 0},
    "dense-3b": {"num_layers": 28, "hidden_size": 3072, "num_heads": 24, "num_kv_heads": 8, "head_dim": 128,
                 "intermediate_size": 8192, "num_experts": 0},
    "small": {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64,
              "intermediate_size": 1408, "num_experts": 0},
    # As many active FLOPs as dense-1b.
    "moe-1b": {"num_layers": 24, "hidden_size": 2048, **HEADS, "num_experts": 32, "top_k": 4, "expert_size": 1024},
}  # fmt: skip
VOCABULARY = 32768
SEQ_LEN = 2048
DRY = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
DRY_SIZES: dict[str, dict[str, Any]] = {
    "dense-1b": {**DRY, "intermediate_size": 128, "num_experts": 0},
    "dense-3b": {**DRY, "intermediate_size": 192, "num_experts": 0},
    "small": {**DRY, "intermediate_size": 128, "num_experts": 0},
    "moe-1b": {**DRY, "num_experts": 4, "top_k": 2, "expert_size": 64},
}


def peak(setting: Setting) -> float:
    """Peak bf16 FLOP/s from the planner's table; NaN for a GPU that is not in it."""
    return peak_flops(torch.device("cuda"), "bf16") or math.nan if setting.device == "cuda" else 1e11


def seconds_of(work: Callable[[], object], setting: Setting, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of a call; on a GPU by events, with the L2 cache flushed between calls."""
    if setting.device != "cuda":
        import time

        work()
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for _ in range(warm_up):
        work()
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        work()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


@dataclass(frozen=True)
class Way:
    """One way to take a training step.

    Attributes:
        by: `engine`: the trainer's DeepSpeed engine; `bare`: a plain loop over our model; `transformers`: over theirs.
        stage: ZeRO stage, for `engine`.
        switches: names of `SWITCHES`.
    """

    by: str = "engine"
    size: str = "dense-1b"
    compiled: bool = True
    stage: int = 0
    recompute: str = "none"
    switches: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    documents: bool = False

    @property
    def name(self) -> str:
        words = [self.by, f"ZeRO-{self.stage}" if self.by == "engine" else "", "compiled" if self.compiled else ""]
        words += [f"recompute {self.recompute}" if self.recompute != "none" else "", *self.switches]
        words += [f"{key}={value}" for key, value in self.model.items()] + ["documents"] * self.documents
        return ", ".join(word for word in words if word)


def run_config(size: str, setting: Setting, rows: int = 4, accumulate: int = 1, **changes: Any) -> Any:
    from configs import from_dict, resolve

    model = dict((DRY_SIZES if setting.dry else SIZES)[size]) | {"vocab_size": 320 if setting.dry else VOCABULARY}
    if size == "moe-1b" and not setting.dry and torch.cuda.get_device_properties(0).total_memory < 100e9:
        model["num_experts"] = 16
    stage, recompute = changes.pop("stage", 0), changes.pop("recompute", "none")
    tree = {
        "model": model | changes.pop("model", {}),
        "train": {"global_batch": rows * accumulate, "micro_batch": rows, "seq_len": 64 if setting.dry else SEQ_LEN,
                  "precision": "bf16", "activation_checkpointing": recompute} | changes,
        "parallel": {"zero_stage": stage},
        "optim": {"lr": 1e-4},
        "tracking": {"enabled": False},
    }  # fmt: skip
    return resolve(from_dict(tree))[0]


def flops_per_token(config: Any) -> tuple[float, float]:
    """Training FLOPs with causal attention counted exactly, and in full as in PaLM (arXiv:2204.02311, appendix B)."""
    from models.planning.cost import training_flops_per_token

    model, length = config.model, config.train.seq_len
    exact = training_flops_per_token(model, length)
    attention = model.num_layers * 4 * model.num_heads * model.head_dim
    return exact, exact + 3 * attention * (length - (length + 1) / 2)


class Rig:
    """A model, its optimizer, and batches on the device."""

    def __init__(self, way: Way, setting: Setting, rows: int, accumulate: int) -> None:
        self.way, self.setting, self.rows, self.accumulate = way, setting, rows, accumulate
        torch.manual_seed(0)
        changes = {"stage": way.stage, "recompute": way.recompute, "model": way.model}
        self.config = run_config(way.size, setting, rows, accumulate, **changes)
        self.batches = [self._batch() for _ in range(2 * accumulate)]
        self.turn, self.scale = 0, accumulate if way.by != "engine" else 1
        builders = {"engine": self._engine, "bare": self._bare, "transformers": self._transformers}
        self.step: Callable[[], Any] = builders[way.by]()

    def _batch(self) -> Any:
        from models.batch import Batch

        rows, length, device = self.rows, self.config.train.seq_len, self.setting.device
        ids = torch.randint(0, self.config.model.vocab_size, (rows, length + 1), device=device)
        places = torch.arange(length, device=device).expand(rows, length)
        documents = None
        if self.way.documents:
            size = length // 4
            documents, places = places // size, places % size
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        return Batch(tokens, labels, places.contiguous(), documents, torch.arange(rows, device=device))

    def next(self) -> Any:
        self.turn += 1
        return self.batches[self.turn % len(self.batches)]

    def _model(self) -> tuple[Any, Any]:
        from models.families import build
        from models.moe.balance import RouterTap

        with torch.device(self.setting.device):
            module = build(self.config.model)
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
        module.set_activation_checkpointing(self.config.train.recompute_every)
        for switch in self.way.switches:
            SWITCHES[switch](module)
        if self.way.compiled:
            for layer in module.model.layers:
                layer.compile(dynamic=False)
        return module, RouterTap(module, self.config.model) if self.config.model.is_moe else None

    def _engine(self) -> Callable[[], Any]:
        from throughput import objective

        from trainer.engine.engine import Engine
        from trainer.engine.start import start_processes

        start_processes(600)
        module, tap = self._model()
        self.engine = engine = Engine(module, self.config)

        def step() -> Any:
            for _ in range(self.accumulate):
                loss = objective(engine(self.next()), tap)
                engine.backward(loss)
                engine.step()
            return loss.detach()

        return step

    def _bare(self) -> Callable[[], Any]:
        from throughput import objective, optimizer_for

        module, tap = self._model()
        module = module.to(torch.bfloat16)
        update = optimizer_for(module, True)

        def step() -> Any:
            for _ in range(self.accumulate):
                loss = objective(module(self.next()), tap) / self.accumulate
                loss.backward()
            update()
            return loss.detach()

        return step

    def _transformers(self) -> Callable[[], Any]:
        from throughput import optimizer_for
        from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

        model = self.config.model
        common = {
            "vocab_size": model.vocab_size, "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim, "max_position_embeddings": self.config.train.seq_len,
            "tie_word_embeddings": False, "use_cache": False,
        }  # fmt: skip
        config: Any
        if model.is_moe:
            config = Qwen3MoeConfig(
                **common, num_experts=model.num_experts, num_experts_per_tok=model.top_k, decoder_sparse_step=1,
                moe_intermediate_size=model.expert_size, norm_topk_prob=True, output_router_logits=True,
            )  # fmt: skip
            config._experts_implementation = "grouped_mm"
        else:
            config = Qwen3Config(**common, intermediate_size=model.intermediate_size)
        with torch.device(self.setting.device):
            module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
        module.train()
        if self.way.compiled:
            for layer in module.model.layers:
                layer.compile()
        if "Liger" in self.way.switches:
            from liger_kernel.transformers import apply_liger_kernel_to_qwen3

            apply_liger_kernel_to_qwen3(model=module)
        update = optimizer_for(module, True)

        def step() -> Any:
            for _ in range(self.accumulate):
                batch = self.next()
                loss = module(input_ids=batch.input_ids, labels=batch.input_ids).loss / self.accumulate
                loss.backward()
            update()
            return loss.detach()

        return step

    def close(self) -> None:
        if engine := getattr(self, "engine", None):
            engine.destroy()
        self.__dict__.clear()
        gc.collect()
        torch._dynamo.reset()
        torch._functorch.config.activation_memory_budget = 1.0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def fp8_rowwise(module: Any) -> None:
    """As `train.precision: fp8`, but each row and column is scaled by its own largest value."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = set(precision.linear_maps(module))
    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(module, config=config, module_filter_fn=lambda _, name: name in chosen)


def plain_sums(module: Any) -> None:
    """Add gradients to the fp32 ones with torch's own mixed-type kernel."""
    precision._add.cache_clear()
    precision._add = lambda: torch.Tensor.add_  # type: ignore[assignment]


def budget(share: float) -> Callable[[Any], None]:
    """Have the compiler keep this fraction of the activations that it would keep, and recompute the cheapest others."""

    def switch(module: Any) -> None:
        torch._functorch.config.activation_memory_budget = share

    return switch


SWITCHES: dict[str, Callable[[Any], None]] = {
    "recompute by op, budget 0.8": budget(0.8),
    "recompute by op, budget 0.6": budget(0.6),
    "plain sums": plain_sums,
    "fp8 tensorwise": precision.multiply_in_fp8,
    "fp8 rowwise": fp8_rowwise,
    "Liger": lambda module: None,
}


def measure(way: Way, setting: Setting, rows: int, accumulate: int = 2, steps: int = 3) -> Iterator[Row]:
    """Tokens/s, MFU and peak memory of a way to train; with half the micro-batch if memory does not suffice."""
    row = attempt(way, setting, rows, accumulate, steps)
    yield row
    if row.get("not_run", "").startswith("out of memory") and rows > 4:
        yield attempt(way, setting, rows // 2, accumulate * 2, steps)


def attempt(way: Way, setting: Setting, rows: int, accumulate: int, steps: int) -> Row:
    import time

    row: Row = {"size": way.size, "way": way.name, "micro_batch": rows, "accumulate": accumulate}
    start = time.perf_counter()
    rig = None
    try:
        rig = Rig(way, setting, rows, accumulate)
        first = float(rig.step())
        rig.step()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        ready = time.perf_counter() - start
        times = []
        for _ in range(steps):
            if setting.device == "cuda":
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                last = rig.step()
                pair[1].record()
                times.append(pair)
            else:
                began = time.perf_counter()
                last = rig.step()
                times.append(time.perf_counter() - began)
        last = float(last)
        took = statistics.median(t[0].elapsed_time(t[1]) / 1e3 if isinstance(t, list) else t for t in times)
        exact, palm = flops_per_token(rig.config)
        tokens = rows * accumulate * rig.config.train.seq_len
        rate = tokens / took
        memory = torch.cuda.max_memory_allocated() / 1e9 if setting.device == "cuda" else None
        return row | {
            "tokens_per_second": rate, "mfu": exact * rate / peak(setting), "mfu_palm": palm * rate / peak(setting),
            "step_ms": took * 1e3, "memory_gb": memory, "ready_s": ready,
            "first_loss": first * rig.scale, "loss": last * rig.scale,
        }  # fmt: skip
    except torch.OutOfMemoryError as error:
        return row | {"not_run": f"out of memory: {str(error)[:120]}"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return row | {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        if rig is not None:
            rig.close()


def race(ways: list[tuple[Way, int]], **given: Any) -> Callable[[Setting], Iterator[Row]]:
    """A part that measures ways one after another, each with its micro-batch."""

    def run(setting: Setting) -> Iterator[Row]:
        for way, rows in ways:
            yield from measure(way, setting, 2 if setting.dry else rows, **given)

    return run

"""How fast training is on the device: ceilings, whole steps with each switch on and off, and where their time goes."""

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from trainer import precision

from . import Part, Row, Setting

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
PEAK = {"h100": 989e12, "h200": 989e12, "a100": 312e12, "b200": 2250e12}
"""Dense bf16, FLOP/s."""


def peak(setting: Setting) -> float:
    if setting.device != "cuda":
        return 1e11
    name = torch.cuda.get_device_name().lower()
    return next((value for key, value in PEAK.items() if key in name), 989e12)


def seconds_of(work: Callable[[], object], setting: Setting, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of a call; on a GPU by events, the L2 cache emptied between two calls."""
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


def matmul(setting: Setting) -> Iterator[Row]:
    """The ceiling: products of the sizes that training has, random numbers in."""
    h, dt = setting.device, torch.bfloat16
    sizes = [(8192, 8192, 8192), (32768, 4096, 2048), (32768, 2048, 2048), (32768, 8192, 3072), (2048, 4096, 32768)]
    for m, n, k in [(128, 64, 64)] if setting.dry else sizes:
        a, b = torch.randn(m, k, device=h, dtype=dt), torch.randn(n, k, device=h, dtype=dt)
        took = seconds_of(lambda a=a, b=b: a @ b.t(), setting)
        yield {"product": f"bf16 {m}x{n}x{k}", "tflops": 2 * m * n * k / took / 1e12}
        if setting.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
            a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=h)
            rows, columns = torch.ones(m, 1, device=h), torch.ones(1, n, device=h)
            for name, sa, sb in (("tensorwise", one, one), ("rowwise", rows, columns)):
                call = lambda: torch._scaled_mm(a8, b8.t(), sa, sb, out_dtype=dt, use_fast_accum=True)  # noqa: B023, E731
                yield {"product": f"fp8 {name} {m}x{n}x{k}", "tflops": 2 * m * n * k / seconds_of(call, setting) / 1e12}
    x = torch.empty(1 << (16 if setting.dry else 30), dtype=torch.int8, device=h)
    y = torch.empty_like(x)
    yield {"product": "copy", "tb_per_second": 2 * x.numel() / seconds_of(lambda: y.copy_(x), setting) / 1e12}


def attention(setting: Setting) -> Iterator[Row]:
    """Causal attention by each of torch's kernels, forward, and forward with backward; FLOPs of the causal half."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from models import flex
    from models.pattern import Pattern

    shapes = [(2, 64, 4, 2, 16)] if setting.dry else [(16, 2048, 16, 8, 128), (4, 8192, 16, 8, 128), (16, 2048, 32, 8, 64)]
    for rows, length, heads, kv, size in shapes:
        q, k, v = (
            torch.randn(rows, n, length, size, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
            for n in (heads, kv, kv)
        )
        dy = torch.randn_like(q)
        flops = 2 * rows * heads * length * length * size  # two products, half of each

        def sdpa(backend: Any) -> Callable[[], Any]:
            def call() -> Any:
                with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: B023

            return call

        ways: dict[str, Callable[[], Any]] = {"sdpa default": sdpa(None)}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            ways[f"sdpa {backend.name.lower()}"] = sdpa(backend)

        def repeated() -> Any:
            groups = heads // kv  # noqa: B023
            return sdpa_all(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))  # noqa: B023

        ways["sdpa default, keys repeated"] = repeated
        places = torch.arange(length, device=setting.device)[None]
        documents = (torch.arange(length, device=setting.device) // max(length // 4, 1)).expand(rows, length)
        with torch.no_grad():
            for name, ids in (("flex causal", None), ("flex, 4 documents a row", documents)):
                place = places if ids is None else places.expand(rows, length) % max(length // 4, 1)
                blocks = flex.block_mask(place, ids, Pattern())
                ways[name] = lambda blocks=blocks: flex.attend(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), blocks  # noqa: B023
                ).transpose(1, 2)
        if setting.device == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            for count in (1, 4):
                ends = torch.arange(0, rows * count + 1, device="cuda", dtype=torch.int32) * (length // count)

                def varlen(ends: Any = ends, longest: int = length // count) -> Any:
                    groups = heads // kv  # noqa: B023
                    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # noqa: B023
                    flat = [flat[0], *(t.repeat_interleave(groups, 1) for t in flat[1:])]
                    y = varlen_attn(*flat, ends, ends, longest, longest, is_causal=True) if _OLD_VARLEN else varlen_attn(
                        *flat, ends, ends, longest, longest, window_size=(-1, 0)
                    )
                    return y.view(rows, length, heads, size).transpose(1, 2)  # noqa: B023

                ways[f"varlen, {count} documents a row"] = varlen
        torch._dynamo.reset()  # torch.compile gives up after eight shapes
        for name, way in ways.items():
            row: Row = {"shape": f"{rows}x{length}, {heads}/{kv} heads of {size}", "by": name}
            try:
                with torch.no_grad():
                    forward = seconds_of(way, setting)
                both = seconds_of(lambda way=way: torch.autograd.grad(way(), (q, k, v), dy), setting)  # noqa: B023
            except Exception as error:
                yield row | {"not_run": f"{type(error).__name__}: {str(error)[:150]}"}
                continue
            share = 0.25 if "4 documents" in name else 1.0
            yield row | {"forward_tflops": share * flops / forward / 1e12, "both_tflops": share * 3.5 * flops / both / 1e12,
                         "both_ms": both * 1e3}  # fmt: skip


def sdpa_all(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _varlen_is_old() -> bool:
    import inspect

    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        return "is_causal" in inspect.signature(varlen_attn).parameters
    return False


_OLD_VARLEN = _varlen_is_old()


def loss(setting: Setting) -> Iterator[Row]:
    """Head and cross-entropy, forward and backward: ours by chunk, and Liger's."""
    from models import loss as models_loss
    from models.loss import chunked_cross_entropy

    tokens, hidden = (128, 64) if setting.dry else (32768, 2048)
    for vocabulary in (256,) if setting.dry else (32768, 131072):
        h = torch.randn(tokens, hidden, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(vocabulary, hidden, device=setting.device, dtype=torch.bfloat16, requires_grad=True)
        w.data.mul_(0.02)
        labels = torch.randint(0, vocabulary, (tokens,), device=setting.device)
        ways: dict[str, Callable[[], Any]] = {}
        for chunk in (64,) if setting.dry else (1024, 4096, 16384):
            ways[f"ours, chunks of {chunk}"] = lambda chunk=chunk: chunked_cross_entropy(h, w, labels, chunk).loss_sum  # noqa: B023

        def eager() -> Any:
            kept, models_loss._in_two_passes = models_loss._in_two_passes, lambda: models_loss._loss_and_gradient
            try:
                return chunked_cross_entropy(h, w, labels, 4096).loss_sum  # noqa: B023
            finally:
                models_loss._in_two_passes = kept

        ways["ours, chunks of 4096, not compiled"] = eager
        with contextlib.suppress(ImportError):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            if setting.device == "cuda":
                liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
                ways["Liger fused linear"] = lambda: liger(w, h, labels)  # noqa: B023
        for name, way in ways.items():
            gc.collect()
            if setting.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row = {"vocabulary": vocabulary, "by": name}
            try:
                took = seconds_of(lambda way=way: torch.autograd.grad(way(), (h, w)), setting, repeats=5)  # noqa: B023
            except Exception as error:
                yield row | {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            memory = torch.cuda.max_memory_allocated() / 1e9 if setting.device == "cuda" else 0.0
            yield row | {"ms": took * 1e3, "tflops": 6 * tokens * hidden * vocabulary / took / 1e12, "memory_gb": memory}


def optimizer(setting: Setting) -> Iterator[Row]:
    """Clipping and fused AdamW over the fp32 weights of dense-1b: each alone, in bytes moved."""
    from models.families import build

    config = run_config("dense-1b", setting).model
    with torch.device(setting.device):
        parameters = list(build(config).parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)
    count = sum(p.numel() for p in parameters)
    adam = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    norm = lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)  # noqa: E731
    for name, work, size in (("norm", norm, 4), ("norm and clip", lambda: torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm(), foreach=True), 12), ("fused AdamW", adam.step, 28)):  # fmt: skip
        took = seconds_of(work, setting, repeats=5)
        yield {"pass": name, "parameters": count, "ms": took * 1e3, "tb_per_second": size * count / took / 1e12}


@dataclass(frozen=True)
class Way:
    """One way to take a training step.

    Attributes:
        by: `engine` is the trainer's DeepSpeed engine, `bare` a plain loop over our model, `transformers` theirs.
        stage: of ZeRO, for `engine`.
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
    """Of training: causal attention counted exactly, and as PaLM counted it (arXiv:2204.02311, appendix B), whole."""
    from models.cost import training_flops_per_token

    model, length = config.model, config.train.seq_len
    exact = training_flops_per_token(model, length)
    attention = model.num_layers * 4 * model.num_heads * model.head_dim
    return exact, exact + 3 * attention * (length - (length + 1) / 2)


class Rig:
    """A model, its optimizer, and batches on the device."""

    def __init__(self, way: Way, setting: Setting, rows: int, accumulate: int) -> None:
        self.way, self.setting, self.rows, self.accumulate = way, setting, rows, accumulate
        torch.manual_seed(0)
        self.config = run_config(way.size, setting, rows, accumulate, stage=way.stage, recompute=way.recompute, model=way.model)
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
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), places.contiguous(), documents, torch.arange(rows, device=device))

    def next(self) -> Any:
        self.turn += 1
        return self.batches[self.turn % len(self.batches)]

    def _model(self) -> tuple[Any, Any]:
        from models.balance import RouterTap
        from models.families import build

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
        return module, (lambda m: RouterTap(m, self.config.model) if self.config.model.is_moe else None)

    def _engine(self) -> Callable[[], Any]:
        from trainer import engine as ds

        ds.start_processes(600)
        module, tap_of = self._model()
        self.engine = engine = ds.build_engine(module, self.config)
        tap, tokens = tap_of(engine.module), self.rows * self.config.train.seq_len

        def step() -> Any:
            for _ in range(self.accumulate):
                out = engine(self.next())
                loss = out.loss_sum / tokens
                if tap:
                    router = tap.collect()
                    loss = loss + 0.01 * router.aux_loss + 0.001 * router.z_loss
                engine.backward(loss)
                engine.step()
            return loss.detach()

        return step

    def _bare(self) -> Callable[[], Any]:
        from throughput import optimizer_for

        module, tap_of = self._model()
        module = module.to(torch.bfloat16)
        tap, update, tokens = tap_of(module), optimizer_for(module, True), self.rows * self.config.train.seq_len

        def step() -> Any:
            for _ in range(self.accumulate):
                loss = module(self.next()).loss_sum / tokens / self.accumulate
                if tap:
                    router = tap.collect()
                    loss = loss + 0.01 * router.aux_loss + 0.001 * router.z_loss
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


def fp8(recipe: str) -> Callable[[Any], None]:
    def switch(module: Any) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        for layer in module.model.layers:
            convert_to_float8_training(
                layer, config=Float8LinearConfig.from_recipe_name(recipe),
                module_filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and "gate." not in f"{name}.".replace("gate_proj", ""),
            )  # fmt: skip

    return switch


def plain_sums(module: Any) -> None:
    """Gradients are added to fp32 ones by torch's own kernel for two types."""
    precision._add.cache_clear()
    precision._add = lambda: torch.Tensor.add_  # type: ignore[assignment]


def budget(share: float) -> Callable[[Any], None]:
    """The compiler keeps this share of the activations that it would keep, and computes the cheapest others again."""

    def switch(module: Any) -> None:
        torch._functorch.config.activation_memory_budget = share

    return switch


SWITCHES: dict[str, Callable[[Any], None]] = {
    "recompute by op, budget 0.8": budget(0.8),
    "recompute by op, budget 0.6": budget(0.6),
    "plain sums": plain_sums,
    "fp8 tensorwise": precision.multiply_in_fp8,
    "fp8 rowwise": fp8("rowwise"),
    "Liger": lambda module: None,
}


def measure(way: Way, setting: Setting, rows: int, accumulate: int = 2, steps: int = 3) -> Iterator[Row]:
    """Tokens/s, MFU and peak memory of a way to train; where memory does not suffice, of half the micro-batch."""
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
            "step_ms": took * 1e3, "memory_gb": memory, "ready_s": ready, "first_loss": first * rig.scale, "loss": last * rig.scale,
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
    """A part that measures ways one after the other, each with its micro-batch."""

    def run(setting: Setting) -> Iterator[Row]:
        for way, rows in ways:
            yield from measure(way, setting, 2 if setting.dry else rows, **given)

    return run


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
        places, ids = torch.arange(length, device=setting.device).expand(rows, length), torch.arange(rows, device=setting.device)

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
        yield {"check": f"{name}: loss after {steps} steps", "ok": abs(difference) < 0.02, "loss": found[name], "error": difference, "allowed": 0.02}


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
    """Kernels by name, the device's idle time, and host syncs of two steps."""

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
        calls = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel",
                 "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")  # fmt: skip
        yield {
            "size": way.size, "way": way.name, "step_ms": whole / 2e3, "busy": busy / whole, "gaps_over_20us": sum(g > 20 for g in gaps) / 2,
            "gap_ms": sum(gaps) / 2e3, "kernels": len(kernels) / 2,
            **{call: sum(e.name == call for e in events) / 2 for call in calls},
        }  # fmt: skip
        by_name: dict[str, list[float]] = {}
        for e in kernels:
            by_name.setdefault(e.name, []).append(e.time_range.end - e.time_range.start)
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]:
            yield {"kernel": name[:110], "ms": sum(times) / 2e3, "share": sum(times) / whole, "calls": len(times) / 2}

    return run


def trainer(size: str, rows: int, accumulate: int, steps: int = 7, **train: Any) -> Callable[[Setting], Iterator[Row]]:
    """The whole trainer, `python -m trainer`, on tokens of Python's own sources: what its record says."""

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
            "train": {"steps": 1000, "global_batch": few[0] * few[1], "micro_batch": few[0], "precision": "bf16",
                      "seq_len": config.train.seq_len, "sample_tokens": 0, "eval_sequences": few[0], "compile": True} | train,
            "data": {"path": str(prepared_data(setting.folder)), "document_mask": False},
            "checkpoint": {"every": 0}, "tracking": {"enabled": False},
        }  # fmt: skip
        path = setting.folder / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        start = time.perf_counter()
        lines: list[dict[str, Any]] = []
        with (setting.folder / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "trainer", str(path)], stdout=log, stderr=log, env=environment(setting))
            try:
                # Killed after so many steps: the last checkpoint of such a model fills a disk.
                while len(lines) < few[2] and process.poll() is None and time.perf_counter() - start < setting.seconds:
                    time.sleep(0.05)
                    with contextlib.suppress(OSError, ValueError):
                        lines = [json.loads(line) for line in (setting.folder / "fast" / "metrics.jsonl").read_text().splitlines()]
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
            "data_wait_s": statistics.median(line["data_wait"] for line in steady), "memory_gb": steady[-1]["memory_gb"],
            "first_step_s": lines[0]["step_time"], "whole_s": whole, "loss": steady[-1]["loss"],
        }  # fmt: skip

    return run


DENSE, BIG, MOE = Way(), Way(size="dense-3b"), Way(size="moe-1b")

PARTS = [
    Part("fast.matmul", matmul, 4),
    Part("fast.dense", race([(DENSE, 16)], accumulate=4), 20),
    Part("fast.eager.dense", race([(Way(compiled=False), 16)], accumulate=4), 15),
    Part("fast.moe", race([(MOE, 8)], accumulate=8), 30),
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

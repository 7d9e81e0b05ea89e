"""Shared by the checks on a GPU: rows, errors, a small model, reports of the compiler and the profiler."""

import contextlib
import logging
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config, from_dict, resolve
from models.batch import Batch
from models.decoder.attention import places
from models.families import build
from models.kernels import flex
from models.loss import LossOutput
from models.moe.balance import RouterTap
from models.tasks.language_modelling import LanguageModelling
from models.tasks.learner import Learner

from . import Row, Setting

Check = Callable[[], Row]

MOE = {"num_experts": 8, "top_k": 2}


def attempt(name: str, check: Check) -> Row:
    """The row of one check, or how it failed. Raises only if the device is unusable for all that follows."""
    try:
        return {"check": name} | check()
    except Exception as error:
        traceback.print_exc()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises the pending error of a kernel, if there is one
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:500]
        at = f"{Path(where.filename).name}:{where.lineno}"
        return {"check": name, "ok": False, "failed": f"{type(error).__name__}: {said}", "at": at}


def within(error: float, allowed: float, **more: Any) -> Row:
    """A row that is ok if the error is at most what is allowed; NaN is not."""
    return {"ok": bool(error <= allowed), "error": float(error), "allowed": allowed} | more


def relative(value: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference / L2 norm of the reference."""
    a, b = value.detach().double().cpu(), reference.detach().double().cpu()
    assert a.shape == b.shape, f"{tuple(a.shape)} beside {tuple(b.shape)}"
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def relative_all(values: dict[str, Tensor], references: dict[str, Tensor]) -> tuple[float, float, str]:
    """`relative` over all tensors together, and that of the worst tensor, with its name."""
    assert values.keys() == references.keys()
    total = squares = worst = 0.0
    name = ""
    for key, reference in references.items():
        a, b = values[key].detach().double().cpu(), reference.detach().double().cpu()
        off, size = float((a - b).square().sum()), float(b.square().sum())
        total, squares = total + off, squares + size
        own = math.sqrt(off / max(size, 1e-60))
        if not own <= worst:
            worst, name = own, key
    return math.sqrt(total / max(squares, 1e-60)), worst, name


def cosine(values: dict[str, Tensor], references: dict[str, Tensor]) -> float:
    """Cosine of the angle between two sets of tensors, each as one vector."""
    dot = one = other = 0.0
    for key, reference in references.items():
        a, b = values[key].detach().double().cpu().flatten(), reference.detach().double().cpu().flatten()
        dot, one, other = dot + float(a @ b), one + float(a @ a), other + float(b @ b)
    return dot / math.sqrt(max(one * other, 1e-60))


def small_config(setting: Setting, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """A resolved config of a small decoder, overridden by `model` and the other sections."""
    if setting.dry:
        sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 128}
        train = {"seq_len": 64, "global_batch": 2, "micro_batch": 2}
    else:
        sizes = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 1024}
        train = {"seq_len": 256, "global_batch": 2, "micro_batch": 2}
    tree = {
        "model": sizes | (model or {}),
        "train": {"precision": "fp32"} | train | sections.pop("train", {}),
        "optim": {"schedule": "constant"} | sections.pop("optim", {}),
        "tracking": {"enabled": False},
    } | sections
    return resolve(from_dict(tree))[0]


def random_batch(config: Config, seed: int = 0, documents: int = 0) -> Batch:
    """Random tokens on the CPU; `documents` per row, cut at random; 0: each row is one document."""
    generator = torch.Generator().manual_seed(seed)
    size, length = config.train.micro_batch or 1, config.train.seq_len
    ids = torch.randint(0, config.model.vocab_size or 0, (size, length + 1), generator=generator)
    labels = ids[:, 1:].contiguous()
    labels[:, ::17] = -100
    document_ids, positions = None, torch.arange(length).expand(size, -1).contiguous()
    if documents:
        document_ids = random_documents(size, length, documents, generator)
        positions = places(document_ids, length, torch.device("cpu"))
    return Batch(ids[:, :-1].contiguous(), labels, positions, document_ids, torch.arange(size) + size * seed)


def random_documents(size: int, length: int, documents: int, generator: torch.Generator) -> Tensor:
    """[B, T] document ids: that many documents in each row, of random lengths."""
    rows = []
    for _ in range(size):
        starts = torch.zeros(length, dtype=torch.int64)
        starts[torch.randperm(length - 1, generator=generator)[: documents - 1] + 1] = 1
        rows.append(starts.cumsum(0))
    return torch.stack(rows)


def plain_model(config: Config, device: str, *, quick: bool = False) -> nn.Module:
    """The model with its initial weights, as training builds it; `quick`: drawn on the device instead."""
    with torch.device(device):
        module = build(config.model)
    if quick:
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(1.0) if p.ndim == 1 else p.normal_(0.0, config.model.init_std)
    else:
        module.init_weights(config.run.seed)  # type: ignore[operator]
    return module.train()


def objective(tap: RouterTap | None, out: LossOutput, config: Config) -> Tensor:
    """What a step minimises: the mean loss per token, and the routers' losses."""
    loss = out.loss_sum / out.tokens
    if router := tap.collect() if tap else None:
        loss = loss + config.model.aux_loss_weight * router.aux_loss + config.model.z_loss_weight * router.z_loss
    return loss


def tap_of(module: nn.Module, config: Config) -> RouterTap | None:
    return RouterTap(module, config.model) if config.model.is_moe else None


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of each parameter's gradient, on the CPU in fp32."""
    found = {name: p.grad for name, p in module.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return {name: gradient.detach().float().cpu().clone() for name, gradient in found.items() if gradient is not None}


def exact_products() -> Row:
    """Check that fp32 products are fp32, without TF32, by the older names, which every torch since 1.7 has."""
    precision = torch.get_float32_matmul_precision()
    exact = precision == "highest" and not torch.backends.cuda.matmul.allow_tf32
    return {"ok": exact, "precision": precision}


def kernels(work: Callable[[], Any], like: Sequence[str]) -> str:
    """Names of the kernels on the GPU that contain one of the words, according to the profiler; empty on a CPU."""
    if not torch.cuda.is_available():
        return ""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            work()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        names = {event.key for event in profiler.key_averages() if getattr(event, "device_type", cuda) == cuda}
        found = sorted(name for name in names if any(word in name.lower() for word in like))
        return "; ".join(name[:70] for name in found[:6]) or f"none of {len(names)}"
    except Exception as error:
        return f"not told: {error}"[:200]


def dynamo_counts() -> Row:
    """Graphs compiled since `fresh_dynamo`, and the reasons for graph breaks."""
    from torch._dynamo.utils import counters

    breaks = dict(counters["graph_break"])
    row: Row = {"graphs": counters["stats"].get("unique_graphs", 0), "breaks": sum(breaks.values())}
    if breaks:
        row["why"] = "; ".join(" ".join(str(reason).split())[:200] for reason in breaks)
    return row


def fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flex._compiled.cache_clear()


class Recompiles(logging.Handler):
    """Collects the reasons why dynamo recompiled something."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []
        self._logger = logging.getLogger("torch._dynamo.guards.__recompiles")

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(" ".join(record.getMessage().split())[-300:])

    def __enter__(self) -> "Recompiles":
        torch._logging.set_logs(recompiles=True)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
        torch._logging.set_logs()


def with_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None) -> list[Tensor]:
    """The output and the gradients of the inputs; only the output without `dout`."""
    if dout is None:
        with torch.no_grad():
            return [attend(*inputs)]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = attend(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dout.to(y.dtype))]


class Trained:
    """An engine over the small model as training builds it, without data or a run's folder."""

    def __init__(self, config: Config, device: str, *, quick: bool = False):
        """`quick`: initial weights are drawn on the device, which saves most of the time for large models."""
        from trainer.engine.engine import Engine
        from trainer.engine.start import start_processes

        start_processes(120)
        self.config, self.device = config, device
        module = plain_model(config, device, quick=quick)
        module.set_activation_checkpointing(config.train.recompute_every)  # type: ignore[operator]
        self.engine = Engine(module, config)
        self.learner = Learner(LanguageModelling(config), {"": self.engine.module})

    def step(self, batch: Batch) -> Any:
        """The outcome of one step."""
        from trainer.step import outcome, train_step

        here = batch.to(self.device)
        tokens = (here.labels != -100).sum().double()
        values = train_step({"model": self.engine}, self.learner, [here], tokens, self.config)
        return outcome(values.tolist(), self.learner.layout)

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights on the CPU, by their names in a checkpoint."""
        from trainer.checkpoint.manifest import MASTER
        from trainer.checkpoint.save import take_snapshot

        tensors = take_snapshot(self.engine).tensors
        return {name: t.clone() for name, t in tensors.items() if name.startswith(MASTER)}

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.engine.destroy()

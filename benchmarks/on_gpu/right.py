"""Are a GPU's results right: compared with the CPU, with plain loops, and with itself.

Every check reports the measured error and the largest one allowed. A check that raises is one failed row; the following
ones still run. Errors are relative: the L2 norm of the difference divided by that of the reference.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config
from models.moe.router import choosers

from . import Part, Row, Setting
from .checks import (
    MOE,
    Trained,
    attempt,
    cosine,
    dynamo_counts,
    exact_products,
    fresh_dynamo,
    gradients,
    objective,
    plain_model,
    random_batch,
    relative_all,
    small_config,
    tap_of,
    within,
)
from .operations import attention, compiled, flexible, grouped

# The model on two devices


class ForcedChoice:
    """Makes routers repeat the choices of another model, and counts how often they would have made them anyway.

    Rounding can swap experts with nearly equal scores; that is no error, but it would hide one.
    """

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []
        self._next = 0
        self.equal: list[float] = []

    def record(self, module: nn.Module) -> None:
        for chooser in choosers(module):
            chooser._choice = self._recording(chooser._choice)  # type: ignore[assignment,method-assign]

    def replay(self, module: nn.Module) -> None:
        for chooser in choosers(module):
            chooser._choice = self._replaying(chooser._choice)  # type: ignore[assignment,method-assign]

    def _recording(self, choice: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def choose(scores: Tensor) -> Tensor:
            self.chosen.append(choice(scores))
            return self.chosen[-1]

        return choose

    def _replaying(self, choice: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def choose(scores: Tensor) -> Tensor:
            other = self.chosen[self._next].to(scores.device)
            self._next += 1
            own = choice(scores)
            self.equal.append((own.sort(-1).values == other.sort(-1).values).all(-1).float().mean().item())
            return other

        return choose


def against_cpu(setting: Setting, model: dict[str, Any], documents: int = 0, allowed: float = 1e-4) -> Row:
    """Loss and gradients of one model on the CPU and on the device, in fp32, dropout on."""
    config = small_config(setting, model)
    batch, forced = random_batch(config, documents=documents), ForcedChoice()
    losses: list[float] = []
    grads: list[dict[str, Tensor]] = []
    for device in ("cpu", setting.device):
        module = plain_model(config, device)
        for number, chooser in enumerate(choosers(module)):
            if chooser.bias is not None:  # one that changes the choice
                chooser.bias = torch.randn(len(chooser.bias), generator=torch.Generator().manual_seed(number)) * 0.02
        (forced.replay if losses else forced.record)(module)
        tap = tap_of(module, config)
        loss = objective(tap, module(batch.to(device)), config)
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(module))
    error, worst, name = relative_all(grads[1], grads[0])
    off = abs(losses[1] - losses[0]) / abs(losses[0])
    row = within(error, allowed, loss_error=off, worst=worst, worst_in=name, loss=losses[1])
    row["ok"] = row["ok"] and off <= 1e-5 and worst <= 10 * allowed
    if forced.equal:
        row["equal_choices"] = sum(forced.equal) / len(forced.equal)
        row["ok"] = row["ok"] and row["equal_choices"] > 0.99
    return row


MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe softmax": MOE,
    "moe, scores not normalised": MOE | {"norm_topk_prob": False},
    "moe sigmoid with bias": MOE | {"router": "sigmoid", "router_bias_rate": 0.001},
    "moe grouped sigmoid": MOE | {"router": "sigmoid", "expert_groups": 4, "top_groups": 2, "router_bias_rate": 0.001},
    "moe hash": MOE | {"router": "hash"},
    "moe gated shared expert": MOE | {"shared_expert_size": 128, "shared_expert_gate": True},
    "moe capacity": MOE | {"capacity_factor": 1.0},
    "moe padded to capacity": MOE | {"capacity_factor": 1.0, "pad_to_capacity": True},
    "moe jitter": MOE | {"router_jitter": 0.1},
    "moe, balanced by sequence": MOE | {"aux_loss_over": "sequence"},
    "moe 64 experts of 8": {"num_experts": 64, "top_k": 8, "expert_size": 64},
    "dropout": {"dropout": 0.1},
    "gqa": {"num_kv_heads": 2},
    "no qk-norm": {"qk_norm": False},
    "rope linear": {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    "rope llama3": {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_positions": 64}},
    "rope yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_positions": 64}},
    "tied embeddings": {"tie_embeddings": True},
}


def model(setting: Setting) -> Iterator[Row]:
    """The whole model in fp32, GPU against CPU."""
    yield attempt("fp32 products are exact", exact_products)
    for name, tree in MODELS.items():
        yield attempt(name, partial(against_cpu, setting, tree))


def patterns(setting: Setting) -> Iterator[Row]:
    """The same if a query sees only some keys: FlexAttention on the GPU, masks on the CPU."""
    small = 2 if setting.dry else 8
    sparse = {"block": 16, "local_blocks": 2, "global_blocks": 1, "stride": 0}
    cases: dict[str, tuple[dict[str, Any], int]] = {
        "documents": ({}, 4),
        "sliding window": ({"sliding_window": 8 * small}, 0),
        "block-sparse": ({"block_sparse": sparse}, 0),
        "documents, window, gqa": ({"sliding_window": 8 * small, "num_kv_heads": 2}, 4),
        "documents, moe": (MOE, 4),
        "heads of 8": ({"num_heads": 8, "num_kv_heads": 8, "head_dim": 8}, 4),
    }
    for name, (tree, documents) in cases.items():
        fresh_dynamo()
        row = attempt(name, partial(against_cpu, setting, tree, documents))
        yield row | dynamo_counts()


# Precision, through DeepSpeed


PLAIN_SGD = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
"""A step by which the weights move by the gradient itself."""


def gradient_of_step(config: Config, device: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a step of the engine, the gradient from how far plain SGD moves the fp32 weights."""
    trained = Trained(config, device)
    before = trained.weights()
    outcome = trained.step(random_batch(config))
    assert not outcome.skipped, "the step was skipped"
    after = trained.weights()
    trained.close()
    return outcome.loss, {name: before[name] - after[name] for name in before}


def precision(setting: Setting) -> Iterator[Row]:
    """bf16 and fp16 through DeepSpeed against fp32, and fp16's loss scale."""
    stages = [("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 1), ("fp16", 2), ("fp16", 3)]
    for kind, tree in (("dense", {}), ("moe", MOE)):
        wide = None
        for name, stage in stages:
            if name == "fp16" and setting.device == "cpu":
                yield {"check": f"{kind}, {name}, ZeRO-{stage}", "skipped": "DeepSpeed refuses fp16 on CPUs"}
                continue

            def config(name: str, stage: int, tree: dict[str, Any] = tree) -> Config:
                train = {"precision": name, "grad_clip": 0.0}
                return small_config(setting, tree, train=train, optim=PLAIN_SGD, parallel={"zero_stage": stage})

            def check(name=name, stage=stage) -> Row:
                nonlocal wide
                wide = wide or gradient_of_step(config("fp32", 0), setting.device)
                loss, gradient = gradient_of_step(config(name, stage), setting.device)
                missing = sorted(wide[1].keys() ^ gradient.keys())
                assert not missing, f"not in both: {missing[:4]}"
                off, angle = abs(loss - wide[0]) / wide[0], cosine(gradient, wide[1])
                error, worst, place = relative_all(gradient, wide[1])
                row = within(off, 1e-2 if name == "bf16" else 2e-3, cosine=angle, gradient_error=error)
                return row | {"worst": worst, "worst_in": place, "ok": row["ok"] and angle > 0.99}

            yield attempt(f"{kind}, {name}, ZeRO-{stage}", check)
    for stage in (1, 2, 3):
        if setting.device == "cpu":
            yield {"check": f"loss scale, ZeRO-{stage}", "skipped": "DeepSpeed refuses fp16 on CPUs"}
        else:
            yield attempt(f"loss scale, ZeRO-{stage}", partial(loss_scale, setting, stage))


def loss_scale(setting: Setting, stage: int) -> Row:
    """fp16: steps that overflow change nothing, the scale falls until one does not, and a resumed run has the same."""

    def config(seed: int) -> Config:
        return small_config(
            setting, train={"precision": "fp16"}, optim={"lr": 1e-3}, parallel={"zero_stage": stage}, run={"seed": seed}
        )

    trained = Trained(config(0), setting.device)
    batch = random_batch(trained.config)
    scaler = trained.engine.deepspeed.optimizer.loss_scaler
    first = scaler.cur_scale
    trained.step(batch)
    scaler.cur_scale = 2.0**40
    before, scales, same, applied, losses = trained.weights(), [2.0**40], True, 0, []
    for _ in range(48):
        outcome = trained.step(batch)
        losses.append(outcome.loss)
        scales.append(float(scaler.cur_scale))
        if not outcome.skipped:
            applied += 1
            if applied == 3:
                break
        elif applied == 0:
            after = trained.weights()
            same = same and all(torch.equal(after[name], before[name]) for name in before)
    moved = any(not torch.equal(after, before[name]) for name, after in trained.weights().items())
    falls = [b / a for a, b in itertools.pairwise(scales)]
    halved = all(fall in (1.0, 0.5) for fall in falls) and 0.5 in falls
    saved = json.loads(json.dumps(trained.engine.loss_scale()))
    trained.close()
    other = Trained(config(1), setting.device)
    other.engine.restore_loss_scale(saved)
    restored = other.engine.loss_scale() == saved and saved["cur_scale"] == scales[-1]
    other.close()
    good = {"unchanged_when_skipped": same, "halved": halved, "goes_on": applied == 3 and moved, "restored": restored}
    finite = all(math.isfinite(loss) for loss in losses)
    return {
        "ok": all(good.values()) and finite, "error": float(not finite), "allowed": 0.0, "first": first,
        "skipped": len(losses) - applied, "last": scales[-1],
    } | good  # fmt: skip


# ZeRO stages and optimizers


def bare_losses(config: Config, device: str, steps: int) -> list[float]:
    """Losses of a plain loop without DeepSpeed."""
    from trainer.engine.optim import build_optimizer, parameter_groups

    module = plain_model(config, device)
    tap, optimizer = tap_of(module, config), build_optimizer(parameter_groups(module, config.optim), config.optim)
    losses = []
    for number in range(steps):
        batch = random_batch(config, number % 3).to(device)
        out = module(batch)
        losses.append((out.loss_sum / out.tokens).item())
        objective(tap, out, config).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def engine_losses(config: Config, device: str, steps: int) -> list[float]:
    trained = Trained(config, device)
    losses = []
    for number in range(steps):
        outcome = trained.step(random_batch(config, number % 3))
        assert not outcome.skipped, f"step {number + 1} was skipped"
        losses.append(outcome.loss)
    trained.close()
    return losses


def stages(setting: Setting) -> Iterator[Row]:
    """ZeRO's stages, offload and the optimizers in one process against a plain loop, in fp32."""
    steps = 4 if setting.dry else 10
    optimizers: dict[str, dict[str, Any]] = {
        "sgd": PLAIN_SGD | {"lr": 0.1, "momentum": 0.9},
        "adamw": {"name": "adamw", "lr": 1e-3},
        "muon": {"name": "muon", "lr": 1e-3},
        "adafactor": {"name": "adafactor", "lr": 1e-3},
        "lion": {"name": "lion", "lr": 1e-4},
    }
    cases: list[tuple[str, str, int, str]] = [
        (kind, optimizer, stage, "none")
        for optimizer in ("sgd", "adamw") for kind in ("dense", "moe") for stage in range(4)
    ]  # fmt: skip
    cases += [("moe", optimizer, 0, "none") for optimizer in ("muon", "adafactor", "lion")]
    cases += [("moe", "adamw", stage, "optimizer") for stage in (1, 2, 3)]
    cases += [("moe", "adamw", 3, "parameters")]
    bare: dict[tuple[str, str], list[float]] = {}
    for kind, optimizer, stage, offload in cases:

        def config(stage: int, offload: str, kind: str = kind, optimizer: str = optimizer) -> Config:
            parallel = {"zero_stage": stage, "offload": offload}
            tree = MOE if kind == "moe" else {}
            train = {"grad_clip": 0.0}
            return small_config(setting, tree, train=train, optim=optimizers[optimizer], parallel=parallel)

        def check(kind=kind, optimizer=optimizer, stage=stage, offload=offload, config=config) -> Row:
            if (kind, optimizer) not in bare:
                bare[kind, optimizer] = bare_losses(config(0, "none"), setting.device, steps)
            found, reference = engine_losses(config(stage, offload), setting.device, steps), bare[kind, optimizer]
            error = max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))
            return within(error, 1e-5, first=found[0], last=found[-1], bare_last=reference[-1])

        yield attempt(f"{kind}, {optimizer}, ZeRO-{stage}" + f", offload {offload}" * (offload != "none"), check)


# The same twice


def deterministic(setting: Setting) -> Iterator[Row]:
    """Two runs from the same seed, with and without torch's deterministic mode.

    In a process of its own: cuBLAS reads its setting when it first opens the device.
    """
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    code = "import sys; from on_gpu import right; right.repeat(sys.argv[1], sys.argv[2] == 'True')"
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, setting.device, str(setting.dry)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row
    finally:
        process.kill()
        process.wait()


def repeat(device: str, dry: bool) -> None:
    """Print the rows of `deterministic`."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setting = Setting(device, dry, Path(), 60.0)
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("dense", {}, 0, "fp32"), ("moe", MOE, 0, "fp32"), ("moe, documents", MOE, 4, "fp32"),
        ("moe", MOE, 0, "bf16"), ("moe capacity", MOE | {"capacity_factor": 1.0}, 0, "bf16"),
    ]  # fmt: skip
    for name, tree, documents, kind in cases:
        config = small_config(setting, tree, train={"precision": kind})

        def runs(config: Config = config, documents: int = documents) -> Row:
            (one, one_losses), (other, other_losses) = (five_steps(config, device, documents) for _ in range(2))
            off = max(abs(a - b) for a, b in zip(one_losses, other_losses, strict=True))
            unequal = sum(not torch.equal(one[key], other[key]) for key in one)
            return {"equal": unequal == 0, "unequal_tensors": unequal, "loss_difference": off}

        def usual(runs: Callable[[], Row] = runs, config: Config = config, documents: int = documents) -> Row:
            torch.use_deterministic_algorithms(True, warn_only=True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                five_steps(config, device, documents)
            torch.use_deterministic_algorithms(False)
            named = {str(w.message).split(" does not have")[0][:80] for w in caught if "determinis" in str(w.message)}
            return runs() | {"nondeterministic": "; ".join(sorted(named))}

        def strict(runs: Callable[[], Row] = runs) -> Row:
            torch.use_deterministic_algorithms(True)
            try:
                row = runs()
            finally:
                torch.use_deterministic_algorithms(False)
            return {"ok": row["equal"], "error": row["loss_difference"], "allowed": 0.0} | row

        for label, check in ((f"{name}, {kind}", strict), (f"{name}, {kind}, not asked to be", usual)):
            print(json.dumps(attempt(label, check)), file=told, flush=True)
    told.close()
    os._exit(0)


def five_steps(config: Config, device: str, documents: int) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of five steps."""
    trained = Trained(config, device)
    losses = [trained.step(random_batch(config, seed, documents)).loss for seed in range(5)]
    weights = trained.weights()
    trained.close()
    return weights, losses


# Memory


def memory(setting: Setting) -> Iterator[Row]:
    """Peak memory against the planner's prediction."""
    if setting.dry:
        sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 256}
        train: dict[str, Any] = {"seq_len": 64, "global_batch": 2, "micro_batch": 2}
        experts = MOE | {"expert_size": 64}
    else:
        sizes = {"num_layers": 16, "hidden_size": 1024, "num_heads": 16, "vocab_size": 32000}
        train = {"seq_len": 1024, "global_batch": 8, "micro_batch": 8}
        experts = MOE | {"expert_size": 512}
    for kind, tree in (("dense", {}), ("moe", experts)):
        for stage in (0, 1):
            for recompute in ("none", "full"):
                more = {"precision": "bf16", "activation_checkpointing": recompute}
                config = small_config(setting, sizes | tree, train=train | more, parallel={"zero_stage": stage})
                yield attempt(f"{kind}, ZeRO-{stage}, recompute {recompute}", partial(peak, setting, config))


def peak(setting: Setting, config: Config) -> Row:
    """Peak memory of three steps against the prediction."""
    from models.planning.cost import parameters
    from models.planning.memory import memory as predicted_memory
    from trainer.record.forecast import PeakMemory

    predicted = predicted_memory(config, setting.device == "cpu")
    gc.collect()
    base = 0
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
    watched = PeakMemory(torch.device(setting.device))
    trained = Trained(config, setting.device, quick=True)
    for seed in range(3):
        trained.step(random_batch(config, seed))
    measured = watched.bytes()
    trained.close()
    assert measured is not None
    del trained
    gc.collect()
    if setting.device == "cuda":  # what an earlier engine left may have been freed meanwhile
        base = min(base, torch.cuda.memory_allocated())
    measured -= base
    row: Row = {
        "predicted_gb": predicted.allocated / 1e9, "measured_gb": measured / 1e9,
        "ratio": measured / predicted.allocated,
        "parameters": parameters(config.model).total,
    }  # fmt: skip
    if setting.device == "cuda":  # on a CPU the process's memory holds more than tensors
        row = within(abs(row["ratio"] - 1), 0.15) | row
        row["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return row


PARTS: list[Part] = [
    Part("right.model", model, 15, alone=False),
    Part("right.precision", precision, 15, alone=False),
    Part("right.attention", attention, 15, alone=False),
    Part("right.experts", grouped, 20, alone=False),
    Part("right.flex", flexible, 45, alone=False),
    Part("right.patterns", patterns, 45, alone=False),
    Part("right.compiled", compiled, 80, alone=False),
    Part("right.stages", stages, 30, alone=False),
    Part("right.deterministic", deterministic, 40, alone=False),
    Part("right.memory", memory, 25, alone=False),
]

"""DeepSpeed, in this one place: process group, engine, the skip guard that ZeRO-0 lacks, and where each state lies."""

import contextlib
import ctypes
import functools
import io
import logging
import math
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config

# Otherwise DeepSpeed warns at every import that it found no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.pipe import DualPipeVModule as DualPipeVModule  # with the next, for pipeline.py
from deepspeed.pipe import PipelineModule as PipelineModule
from deepspeed.sequence.layer import DistributedAttention as DistributedAttention  # for ulysses.py
from deepspeed.utils import groups

from trainer.health import flight
from trainer.processes import collectives, rendezvous

from .optim import build_optimizer, parameter_groups
from .parallel import engine_sections, expert_group_name, keep_routers, zero_section
from .precision import WorkingCopies
from .slots import norm_of_whole_gradient

# Its warnings repeat what the run's own record says (skipped steps, untested optimizers).
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# Its collectives go by the names torch 2.13 is about to retire, a warning for every call.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
# DeepSpeed would compile a helper for shared-memory collectives on CPU at the first start: a minute, a compiler, and a
# lock that a killed process leaves behind for ever. gloo does the same work.
if os.environ["DS_ACCELERATOR"] == "cpu":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

VERSION: str = deepspeed.__version__


def device() -> torch.device:
    """This process's device: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """On CPU, let glibc keep what torch frees for the next step instead of giving it back to the kernel.

    Every tensor above 128 kB is otherwise mapped and faulted in anew, page by page: seen to slow chains of elementwise
    operations by four. Nothing happens on another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def be_deterministic() -> None:
    """Let this process's device give the same bits for the same work, or raise where no kernel does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    # For those who read memory that they never wrote; we don't.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start_processes(timeout_s: float) -> None:
    """Join the process group named by torchrun's environment variables (a lone process is its own group).

    From here on torch's object collectives raise.

    Raises:
        RuntimeError: not all have come within the time, or what has joined as another rank does not know the attempt's
            secret (trainer.processes.rendezvous).
    """
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if not torch.distributed.is_initialized():
        where = device()
        if where.type == "cuda":
            torch.cuda.set_device(where)
        else:
            keep_freed_memory()
        flight.switch_on()
        collectives.refuse_pickles()
        rendezvous.stay_here()
        secret = rendezvous.take_secret()
        with rendezvous.all_expected(timeout_s):
            store = rendezvous.open_store(secret, timeout_s)
            torch.distributed.init_process_group(
                "nccl" if where.type == "cuda" else "gloo",
                store=store,
                rank=int(os.environ["RANK"]) if store else -1,
                world_size=int(os.environ["WORLD_SIZE"]) if store else -1,
                timeout=timedelta(seconds=timeout_s),
            )
        if secret:
            rendezvous.prove(secret)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


class _Guarded:
    """Mixin over a torch optimizer for ZeRO-0: clip by the global norm, and skip a step whose norm is not finite.

    DeepSpeed does both inside its ZeRO and bf16 optimizers, and neither for a plain one in fp32 (there a single NaN
    gradient ends the run's weights). It reads `overflow` and `_global_grad_norm` from whatever optimizer it drives.
    """

    param_groups: list[dict[str, Any]]
    max_norm = 0.0
    overflow = False
    """Stays so: DeepSpeed asks it with `if`, which would make the host wait; `found_inf` tells."""
    _global_grad_norm: Tensor
    not_finite: Tensor
    copies: WorkingCopies | None = None
    """Of the parameters, which follow them."""
    found_inf: Tensor | None = None
    """1 where the norm is not finite. Optimizers that support torch.amp.GradScaler look here, on the device, whether to
    leave weights and states alone."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        self.not_finite = (~norm.isfinite()).float()
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm, foreach=True)
        if getattr(self, "_step_supports_amp_scaling", False):
            self.found_inf = self.not_finite
        elif self.not_finite.item():  # adagrad, rmsprop, adafactor: the host waits for the norm
            return
        super().step(closure)  # type: ignore[misc]
        if self.copies:
            self.copies.refresh()


def guard(optimizer: Any, max_norm: float, copies: WorkingCopies | None = None) -> None:
    """Let an optimizer clip by the global norm (0: not), skip a step whose norm is not finite, and refresh copies."""
    optimizer.__class__ = type(f"Guarded{type(optimizer).__name__}", (_Guarded, type(optimizer)), {})
    optimizer.max_norm, optimizer.copies = max_norm, copies


def norm_and_skipped(engine: Any) -> Tensor:
    """Of the step just launched, on the device: gradient norm before clipping, and 1 where it was skipped, in float64.

    With ZeRO DeepSpeed (0.19.8) has waited for the device in its own step, to know whether there is an overflow.
    """
    if isinstance(engine.optimizer, _Guarded):
        values: tuple[Any, Any] = engine.optimizer._global_grad_norm, engine.optimizer.not_finite
    else:
        values = engine.get_global_grad_norm(), not engine.was_step_applied()
    both = torch.empty(2, dtype=torch.float64, device=engine.device)
    for place, value in zip(both, values, strict=True):
        place.copy_(value) if torch.is_tensor(value) else place.fill_(value or 0.0)
    return both


def engine_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed config of a resolved run config."""
    train, stage = config.train, config.parallel.zero_stage
    assert train.micro_batch
    micro_batches = math.ceil(train.global_batch / train.micro_batch)
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": math.ceil(micro_batches / config.parallel.dp),
        # DeepSpeed's default is 1.0, not off. At ZeRO-0 the guard above clips.
        "gradient_clipping": train.grad_clip if stage else 0.0,
        "zero_optimization": {"stage": stage, "overlap_comm": torch.cuda.is_available()} | zero_section(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would make the host wait for the device twice a step
    }
    if train.kept_in == "bf16" and stage:
        result["bf16"] = {"enabled": True, "immediate_grad_update": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    elif train.precision == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return result | engine_sections(config)


def build_engine(module: nn.Module, config: Config) -> Any:
    """A DeepSpeed engine over a plain module, with the run's optimizer; the process group must exist."""
    experts = expert_group_name(config) if config.parallel.ep > 1 else None
    optimizer = build_optimizer(parameter_groups(module, config.optim, experts), config.optim)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if config.parallel.zero_stage == 0:
        copies = WorkingCopies(module, torch.bfloat16) if config.train.kept_in == "bf16" else None
        guard(optimizer, config.train.grad_clip, copies)
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory of the machine four times
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=engine_config(config), dist_init_required=False
        )
    parameters_changed(engine)  # DeepSpeed has sent rank 0's to all
    note_shapes(engine, shapes)
    keep_routers(engine.module)
    if config.parallel.tp > 1:
        # It compares the first inputs over the ranks, as tensors in tuples; ours are a dataclass, and a pure function
        # of the cursor.
        engine.first_dataloader_check.remove()
    if config.parallel.tp > 1 and config.parallel.ep > 1:
        engine.optimizer.scaled_global_norm = functools.partial(norm_of_whole_gradient, engine)
    if config.parallel.zero_stage == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would flatten and copy every gradient for nobody else
    return engine


def note_shapes(engine: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Leave with a new engine what `slots` asks for: the plain model's shapes, and this process's ranks."""
    engine.plain_shapes = shapes
    engine.tp_rank = groups.get_tensor_model_parallel_rank() if engine.autotp_size() > 1 else 0
    names = {p.group_name for p in engine.module.parameters() if hasattr(p, "group_name")}
    engine.ep_rank = max((groups._get_expert_parallel_rank(name) for name in names), default=0)


def parameters_changed(engine: Any) -> None:
    """To be called when parameters were written by anyone but the optimizer."""
    if copies := getattr(engine.optimizer, "copies", None):
        copies.refresh()


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer under DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in base_optimizer(engine).param_groups:
        group["lr"] = rate


def loss_scale_state(engine: Any) -> dict[str, Any] | None:
    """State of fp16's dynamic loss scaler as plain numbers; None in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not engine.fp16_enabled() or scaler is None:
        return None
    return {key: value for key, value in vars(scaler).items() if isinstance(value, int | float | bool)}


def restore_loss_scale(engine: Any, state: dict[str, Any] | None) -> None:
    """Go on with a loss scale and what it counts; its settings are the config's."""
    if state is not None and engine.fp16_enabled():
        counts = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        vars(engine.optimizer.loss_scaler).update({key: state[key] for key in counts if key in state})

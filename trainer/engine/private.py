"""DeepSpeed 0.19.8, imported quietly, and every use of its undocumented names: no other file has any.

Internals may change with any release, which is why pyproject.toml pins DeepSpeed below the next minor version.
"""

import contextlib
import io
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Otherwise DeepSpeed warns at every import that it found no accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed as deepspeed
from deepspeed.pipe import DualPipeVModule as DualPipeVModule
from deepspeed.pipe import PipelineModule as PipelineModule
from deepspeed.sequence.layer import DistributedAttention as DistributedAttention
from deepspeed.utils import groups

# Its warnings repeat what the run's own record says (skipped steps, untested optimizers).
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# It calls collectives by names that torch 2.13 deprecates, with a warning for every call.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
# DeepSpeed would compile a helper for shared-memory collectives on CPU at the first start. That takes a minute and a
# compiler, and a process killed meanwhile leaves a lock behind for ever. gloo does the same work.
if os.environ["DS_ACCELERATOR"] == "cpu":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

VERSION: str = deepspeed.__version__


def initialize(module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine over a module, without its output: it prints the machine's memory four times."""
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer under DeepSpeed's wrapper."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def tensor_parallel_rank() -> int:
    return groups.get_tensor_model_parallel_rank()


def expert_parallel_rank(module: nn.Module) -> int:
    """0 without expert parallelism."""
    names = {parameter.group_name for parameter in module.parameters() if hasattr(parameter, "group_name")}
    return max((groups._get_expert_parallel_rank(name) for name in names), default=0)


def compare_no_inputs(engine: Any) -> None:
    """Remove AutoTP's comparison of the first inputs across ranks: it expects tuples of tensors, ours are a dataclass,
    and a pure function of the cursor anyway."""
    engine.first_dataloader_check.remove()


def reduce_no_gradients(engine: Any) -> None:
    """Switch off the all-reduce of gradients: at ZeRO-0 it would flatten and copy each one, for nothing in a single
    process."""
    engine.enable_backward_allreduce = False


def count_once(engine: Any, counted: set[int]) -> None:
    """Make the global gradient norm at ZeRO 1 and 2 that of the parameters with these ids, over all processes.

    DeepSpeed chooses what it counts by tensor-parallel rank, and so misses some of the experts when expert and tensor
    parallelism are combined.
    """
    optimizer = engine.optimizer

    def norm() -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for group, parameters in enumerate(optimizer.params_in_partition):
            gradients = [g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
            for gradient, parameter in zip(gradients, parameters, strict=True):
                if id(parameter) in counted:
                    total += torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()
        torch.distributed.all_reduce(total)
        found = total.sqrt().float()
        return torch.where(found.isfinite(), found, -1.0)  # DeepSpeed's marker for a norm that is not finite

    optimizer.scaled_global_norm = norm


def local_shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape in this process, before ZeRO-3 shards it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Stretch:
    """The elements of one parameter, flattened, whose fp32 weights and optimizer states this process holds."""

    start: int
    numel: int
    owner: Tensor
    """Tensor that the optimizer keys its state by."""
    offset: int
    """First element of the stretch in `owner`, flattened."""
    working: Tensor | None = None
    """The same elements of the working weight, 1-D, if the process holds no others of it (ZeRO-3); else None."""


def stretch(engine: Any, parameter: Any) -> Stretch | None:
    """This process's stretch of a parameter at any ZeRO stage; None if other processes hold all of it."""
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.ds_numel
        start = torch.distributed.get_rank(parameter.ds_process_group) * size
        numel = min(size, parameter.ds_numel - start)  # the last piece is padded
        if numel <= 0:
            return None
        if not parameter.requires_grad:
            return Stretch(start, numel, parameter.ds_tensor, 0, parameter.ds_tensor[:numel])
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        owner = optimizer.fp32_partitioned_groups_flat[group]
        return Stretch(start, numel, owner, offset, parameter.ds_tensor[:numel])
    if hasattr(parameter, "_hp_mapping"):
        if (mapping := parameter._hp_mapping) is None:
            return None
        flat = getattr(optimizer, "fp32_groups_flat_partition", None)
        if flat is None:
            flat = optimizer.single_partition_of_fp32_groups
        held, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Stretch(held.start, held.numel, flat[mapping.param_group_index], here.start)
    return Stretch(0, parameter.numel(), parameter, 0)


def weights_changed(engine: Any) -> None:
    """At ZeRO-3, drop gathered weights and hpZ's copies of the shards, and gather again the small weights that it keeps
    whole. A collective at ZeRO-3."""
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_prologue()
        engine.optimizer.checkpoint_event_epilogue()


def use_masters(engine: Any) -> None:
    """Copy the fp32 weights into the working weights, as a step does. A collective; ZeRO 1 and 2 only."""
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()


def scaler_of(engine: Any) -> Any:
    """The fp16 loss scaler, or None."""
    return getattr(engine.optimizer, "loss_scaler", None)


def loss_scale_state(scaler: Any) -> dict[str, Any]:
    """State of a loss scaler as plain numbers."""
    return {key: value for key, value in vars(scaler).items() if isinstance(value, int | float | bool)}


def restore_loss_scale(scaler: Any, state: dict[str, Any]) -> None:
    """Restore the loss scale and its counters; the scaler's settings come from the config."""
    counts = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    vars(scaler).update({key: state[key] for key in counts if key in state})


def evaluate(engine: Any, inputs: Any, micro_batches: int) -> None:
    """Run a pipeline forward over some micro-batches, without gradients."""
    # DualPipeVEngine finds a micro-batch's second buffer by the number of micro-batches in a training step.
    of_a_step, engine.micro_batches = engine.micro_batches, micro_batches
    engine.eval_batch(inputs, reduce_output=None, bcast_loss=False, num_micro_batches=micro_batches)
    engine.micro_batches = of_a_step

"""The DeepSpeed config of a run: micro-batches, clipping, precision, and the topology's sections from `parallel`."""

import math
from typing import Any

import torch

from configs import Config

from .parallel import engine_sections, zero_section


def engine_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed config of a resolved run config."""
    train, stage = config.train, config.parallel.zero_stage
    assert train.micro_batch
    micro_batches = math.ceil(train.global_batch / train.micro_batch)
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": math.ceil(micro_batches / config.parallel.dp),
        # DeepSpeed's default is 1.0, not off. At ZeRO-0 `guard` clips.
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

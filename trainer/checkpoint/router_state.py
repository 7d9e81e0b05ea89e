"""What routers remember from step to step, the same in every process: balancing biases, and the last step's loads."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from configs import Config, ModelConfig
from configs.reading.parse import shortened
from models.moe.router import Chooser
from trainer.state import TrainState

Routers = dict[str, list[list[float]]]
"""`bias` and `load`, each [MoE layers][experts], where the config asks for them."""


def fresh_routers(model: ModelConfig) -> Routers:
    """Before the first step: no bias, and even loads."""
    layers, experts = sum(map(model.is_moe_layer, range(model.num_layers))), model.num_experts
    found: Routers = {}
    if layers and model.router_bias_rate is not None:
        found["bias"] = [[0.0] * experts for _ in range(layers)]
    if layers and model.aux_loss_over == "global_batch":
        found["load"] = [[1 / experts] * experts for _ in range(layers)]
    return found


def wrong_routers(state: TrainState, model: ModelConfig) -> str:
    """What of a checkpoint's state is not of the model's MoE layers and experts; empty if all is."""
    layers, experts = sum(map(model.is_moe_layer, range(model.num_layers))), model.num_experts
    remembered: dict[str, Sequence[Sequence[float]]] = {**state.routers, "starved": state.starved}
    for name, rows in remembered.items():
        if name not in ("bias", "load", "starved"):
            return f"state.routers has {shortened(name)}, which no router remembers"
        if rows and (len(rows) != layers or any(len(row) != experts for row in rows)):
            return f"state: {name} is not of the model's {layers} MoE layers of {experts} experts"
    return ""


def on_device(routers: Routers, here: torch.device) -> dict[str, Tensor]:
    """The same as float64 tensors [MoE layers, experts]."""
    return {key: torch.tensor(rows, dtype=torch.float64, device=here) for key, rows in routers.items()}


def after_step(
    routers: dict[str, Tensor], load: Tensor, skipped: Tensor, micro_batches: int, config: Config
) -> dict[str, Tensor]:
    """What they remember after a step; of a skipped one nothing. All of it stays on the device.

    A bias moves by `model.router_bias_rate` towards an even load (arXiv:2412.19437, section 2.1.2): b_e += rate *
    sign(mean load - load_e). Loads are compared as whole numbers of assignments, so that no rounding tips the sign.

    Args:
        load: float64 [MoE layers, experts], each expert's share of the assignments over the whole global batch.
        skipped: bool.
        micro_batches: of the global batch, filled ones included.
    """
    model, train = config.model, config.train
    found = dict(routers)
    if "load" in routers:
        found["load"] = load
    if "bias" in routers and model.router_bias_rate:
        assert train.micro_batch
        assignments = micro_batches * train.micro_batch * train.seq_len * model.top_k
        short = assignments - (load * assignments).round() * load.shape[1]
        found["bias"] = routers["bias"] + model.router_bias_rate * short.sign()
    return {key: torch.where(skipped, routers[key], value) for key, value in found.items()}


def tell(choosers: Iterable[Chooser], routers: dict[str, Tensor], model: ModelConfig) -> None:
    """Hand each chooser, which may be some of the model's only, what it remembers."""
    order = [i for i in range(model.num_layers) if model.is_moe_layer(i)]
    rows = {key: value.float() for key, value in routers.items()}
    for chooser in choosers:
        row = order.index(chooser.layer)
        if "bias" in rows:
            chooser.bias = rows["bias"][row]
        if "load" in rows:
            chooser.global_load = rows["load"][row]

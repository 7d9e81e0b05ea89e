"""Mixture-of-Experts block: router, grouped experts, shared expert.

Shapes: S tokens, H hidden size, E experts, k experts per token, I width of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import ModelConfig
from models.decoder.layers import SwiGLU

from .experts import Routing, apply_experts, apply_padded
from .router import Chooser, Router


class Experts(nn.Module):
    """E SwiGLU experts in two stacked weights, named and laid out as in Hugging Face Qwen3-MoE."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.config = config
        experts, hidden = config.num_experts, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def forward(self, x_SH: Tensor, routing: Routing) -> Tensor:
        if self.config.pad_to_capacity and routing.kept is not None:
            limit = self.config.capacity(len(x_SH))
            return apply_padded(x_SH, self.gate_up_proj, self.down_proj, routing, limit)
        return apply_experts(x_SH, self.gate_up_proj, self.down_proj, routing)


class MoE(nn.Module):
    """Sum of the chosen experts and of the shared one; see `Chooser` for how they are chosen."""

    def __init__(self, config: ModelConfig, size: int, chooser: Chooser):
        super().__init__()
        self.chooser = chooser
        self.gate = Router(config.hidden_size, config.num_experts, bias=False) if config.router != "hash" else None
        self.experts = Experts(config, size)
        shared = config.shared_expert_size
        self.shared_expert = SwiGLU(config.hidden_size, shared) if shared else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_SH = x_BTH.flatten(0, 1)
        y_BTH = self.experts(x_SH, self.chooser(self.gate, x_SH)).view_as(x_BTH)
        if self.shared_expert is None:
            return y_BTH
        shared_BTH = self.shared_expert(x_BTH)
        if self.shared_expert_gate is not None:
            shared_BTH = F.sigmoid(self.shared_expert_gate(x_BTH)) * shared_BTH
        return y_BTH + shared_BTH

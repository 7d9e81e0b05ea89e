"""Mixture-of-Experts block: router, grouped experts, shared expert.

Shapes: S tokens, H hidden size, E experts, k experts per token, A = S * k assignments, I width of an expert.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import ModelConfig

from .experts import apply_experts
from .layers import SwiGLU


class Router(nn.Linear):
    """Logits of every expert, fp32 whatever the precision: top-k choices turn on small differences."""

    def forward(self, x_SH: Tensor) -> Tensor:
        return F.linear(x_SH.float(), self.weight.float())


class Experts(nn.Module):
    """E SwiGLU experts in two stacked weights, named and laid out as in Hugging Face Qwen3-MoE."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def forward(self, x_SH: Tensor, choice_Sk: Tensor, weight_Sk: Tensor) -> Tensor:
        return apply_experts(x_SH, self.gate_up_proj, self.down_proj, choice_Sk, weight_Sk)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.top_k, self.norm_topk_prob = config.top_k, config.norm_topk_prob
        self.gate = Router(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config, size)
        shared = config.shared_expert_size
        self.shared_expert = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_SH = x_BTH.flatten(0, 1)
        choice_Sk, weight_Sk = route(self.gate(x_SH), self.top_k, self.norm_topk_prob)
        y_BTH = self.experts(x_SH, choice_Sk, weight_Sk).view_as(x_BTH)
        return y_BTH if self.shared_expert is None else y_BTH + self.shared_expert(x_BTH)


def route(logits_SE: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """The k most probable experts of each token [S, k] and their weights [S, k] fp32."""
    weight_Sk, choice_Sk = logits_SE.softmax(-1).topk(top_k, dim=-1)
    return choice_Sk, weight_Sk / weight_Sk.sum(-1, keepdim=True) if normalise else weight_Sk

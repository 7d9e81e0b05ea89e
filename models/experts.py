"""The experts' arithmetic: sort tokens by expert, two grouped matrix products, weighted sum back.

Shapes: S tokens, H hidden size, E experts, k experts per token, A = S * k assignments, I width of an expert.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def apply_experts(x_SH: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, choice_Sk: Tensor, weight_Sk: Tensor) -> Tensor:
    """sum_j weight[s, j] * expert[choice[s, j]](x[s]) with expert e = SwiGLU of gate_up[e], down[e]. Returns [S, H]."""
    num_experts, top_k = gate_up_E2IH.shape[0], choice_Sk.shape[1]
    expert_A = choice_Sk.flatten()
    order_A = expert_A.argsort(stable=True)
    offsets_E = torch.bincount(expert_A, minlength=num_experts).cumsum(0).to(torch.int32)
    x_AH = x_SH.index_select(0, order_A // top_k)
    gate_AI, up_AI = grouped_mm(x_AH, gate_up_E2IH.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
    hidden_AI = F.silu(gate_AI) * up_AI * weight_Sk.flatten()[order_A, None].to(x_SH.dtype)
    y_AH = grouped_mm(hidden_AI, down_EHI.transpose(1, 2), offs=offsets_E)
    return y_AH.index_select(0, order_A.argsort()).view(-1, top_k, x_SH.shape[-1]).sum(1)

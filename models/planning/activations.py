"""Bytes of activations, layer by layer, counted from what autograd saves in models/*.py (no torch).

Symbols as in the code: S tokens of a micro-batch on one device, H hidden size, N query and K key heads of size D, I
width of an MLP, E experts, k experts per token, A = S * k assignments, V vocabulary, C tokens of a chunk of the loss;
e bytes of an activation.
"""

from configs import Config

from .shards import activation_bytes, shape, tokens_per_device

LONGEST_KERNEL = 512
"""Keys up to which models/decoder/attention.py takes its own CPU kernel, which keeps probabilities in fp32."""


def layer_activations(config: Config, moe: bool, cpu: bool) -> float:
    """Bytes that one layer keeps for its backward pass, its input included: what autograd saves in models/*.py.

    Tensor parallelism splits what lies between column- and row-wise products; the residual stream stays whole.
    """
    model, parallel, tp = config.model, config.parallel, config.parallel.tp
    hidden, heads, kv, size = shape(model)
    tokens, e, length = tokens_per_device(config), activation_bytes(config), config.train.seq_len
    q, k = heads * size // tp, kv * size // tp
    kept: float = 2 * tokens * (hidden * e + 4)  # x and 1 / rms of both norms
    kept += 2 * tokens * hidden * e  # their outputs, which the projections keep
    if model.qk_norm:
        kept += tokens * ((q + k) * e + (heads + kv) // tp * 4)
    kept += tokens * (2 * q + 2 * k) * e  # queries, keys, values, the output projection's input
    if cpu and length <= LONGEST_KERNEL:
        if e == 4:
            blocks = range(0, length, 64)
            pairs = sum((min(at + 64, length) - at) * min(at + 64, length) for at in blocks)
            kept += tokens / length * heads / tp * pairs * 4  # probabilities
    else:
        kept += tokens * heads / tp * 4  # log of the sum
    if not moe:
        return kept + 4 * tokens * (model.intermediate_size or 0) // tp * e  # gate, silu(gate), up, their product
    assigned, width = tokens * model.top_k, model.expert_size or 0
    kept += _router_activations(config)
    if model.pad_to_capacity:
        slots = model.num_experts * model.capacity(tokens)
        kept += slots * (hidden + 4 * width) * e + assigned * (2 * hidden * e + e + 8)
    elif cpu and parallel.ep == 1:
        slots = assigned if e == 4 else assigned + 32 * model.num_experts  # rounded up, at most so for most experts
        kept += slots * (2 * width * e + 16) + assigned * 12
    else:
        kept += assigned * (hidden + 5 * width) * e + assigned * (e + 16)
    if model.shared_expert_gate:
        kept += tokens * (hidden + 1) * e
    return kept + 4 * tokens * model.shared_expert_size // tp * e


def _router_activations(config: Config) -> float:
    """Bytes of logits and scores in fp32, the choice and its weights (models/moe/router.py)."""
    model, tokens, e = config.model, tokens_per_device(config), activation_bytes(config)
    if model.router == "hash":
        return 0.0
    each = 8 * model.num_experts + 8 * model.top_k + 4 + 4 * (model.router == "sigmoid")
    each += (4 + 4 * model.top_k) * model.norm_topk_prob + model.top_k * (model.capacity_factor is not None)
    each += model.hidden_size * 4 * (config.train.precision == "fp16")  # the router's input
    return tokens * (each + model.hidden_size * e * (e // 2) * (model.router_jitter > 0))


def layer_work(config: Config, moe: bool) -> float:
    """Bytes that come and go within one layer's backward pass: gradients between its products."""
    model, tokens, e = config.model, tokens_per_device(config), activation_bytes(config)
    hidden, heads, _, size = shape(model)
    width = model.intermediate_size or 0
    mlp = tokens * model.top_k * hidden if moe else 3 * tokens * width // config.parallel.tp
    return (max(mlp, 3 * tokens * heads * size // config.parallel.tp) + 2 * tokens * hidden) * e


def loss_work(config: Config, cpu: bool) -> tuple[float, float]:
    """Bytes of the loss (models/loss.py) and of the routers' losses: as they are computed, and as backward begins."""
    model, e, tokens = config.model, activation_bytes(config), tokens_per_device(config)
    chunk = min(model.loss_chunk, tokens)
    table, several = (model.vocab_size or 0) * model.hidden_size, tokens > chunk
    logits = chunk * (model.vocab_size or 0) * (e if cpu or e == 4 else e + 4)
    kept = table * (4 if several else e) + 2 * tokens * model.hidden_size * e
    routers = 3 * model.num_moe_layers * tokens * model.num_experts * 4
    return float(logits + kept + routers + table * e * several), float(kept + routers + table * 4)

"""Optimizers and their parameter groups: torch's own where torch has them, plus Lion and a batched Muon; and what
changes the gradients that they are given."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adagrad import adagrad

from configs.sections.optim import OptimConfig
from models.noise import normal_of_elements

from .slots import Slot


def parameter_groups(module: nn.Module, config: OptimConfig, experts: str | None = None) -> list[dict[str, Any]]:
    """Split the parameters into those that decay and those that do not (norms, biases, embeddings).

    Args:
        experts: name of the expert-parallel process group; experts then get groups of their own, marked for DeepSpeed,
            which averages and shards them over fewer ranks.

    Parameters are in the module's order, so that every process and every topology builds the same groups. For Muon the
    matrices inside the layers get groups of their own (`use_muon`); embeddings and the head use AdamW, as its author
    advises (https://kellerjordan.github.io/posts/muon/).
    """
    embeddings = {
        id(parameter) for m in module.modules() if isinstance(m, nn.Embedding) for parameter in m.parameters()
    }
    groups: dict[tuple[bool, bool, bool], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        decay = matrix or config.decay_all
        muon = config.name == "muon" and matrix and not name.startswith("lm_head")
        expert = experts is not None and ".experts." in name
        groups.setdefault((muon, decay, expert), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0, "use_muon": muon}
        | ({"l1": config.l1} if decay and config.l1 else {})
        | ({"moe": True, "name": experts} if expert else {})
        for (muon, decay, expert), parameters in groups.items()
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer named by `optim.name`, over fp32 master weights.

    `fused` is torch's one-pass kernel, on CPU and CUDA, where the optimizer has one: it reads and writes each state
    once, without DeepSpeed's compiled helper ops, and so without a compiler.
    """
    lr, betas, eps = config.lr, config.betas, config.eps
    builders: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True),
        "adam": lambda: torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True),
        "sgd": lambda: SGD(
            groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov and config.momentum > 0, fused=True
        ),
        "adagrad": lambda: Adagrad(groups, lr=lr, eps=eps),
        "rmsprop": lambda: torch.optim.RMSprop(
            groups, lr=lr, alpha=config.alpha, eps=eps, momentum=config.momentum, foreach=True
        ),
        "adafactor": lambda: torch.optim.Adafactor(groups, lr=lr),
        "lion": lambda: Lion(groups, lr=lr, betas=betas),
        "muon": lambda: Muon(groups, lr=lr, betas=betas, eps=eps, momentum=config.momentum, nesterov=config.nesterov),
    }
    optimizer = builders[config.name]()
    if config.max_weight is not None:
        optimizer.register_step_post_hook(partial(_clip_weights, config.max_weight))
    return optimizer


@torch.no_grad()
def _clip_weights(limit: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        torch._foreach_clamp_min_(group["params"], -limit)
        torch._foreach_clamp_max_(group["params"], limit)


def clip_by_value(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Let every step clamp the elements of its gradients to [-limit, limit], after clipping by the norm."""

    def clamp(optimizer: Any, *_: Any) -> None:
        nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], limit)

    optimizer.register_step_pre_hook(clamp)


def penalise_magnitudes(optimizer: torch.optim.Optimizer) -> None:
    """Let every step add to the gradient that of the L1 penalty of each group."""

    def add(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"] if group.get("l1") else ():
                if p.grad is not None:
                    p.grad.add_(p.detach().sign(), alpha=group["l1"])

    optimizer.register_step_pre_hook(add)


class GradientNoise:
    """Gaussian noise on the gradients of every step (arXiv:1511.06807), a function of the seed, the step and the place
    in the weight, so that it is the same in every topology.

    Args:
        slots: of all parameters that the optimizer updates in this process.
        eta: the variance at step 1; it falls with step ** 0.55.

    Attributes:
        step: number of the next optimizer step, to be set before it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, slots: Iterable[Slot], eta: float, seed: int):
        self._eta, self._seed, self.step = eta, seed, 1
        self._slots: dict[int, list[Slot]] = {}
        for slot in slots:
            self._slots.setdefault(id(slot.owner), []).append(slot)
        optimizer.register_step_pre_hook(self._add)

    @torch.no_grad()
    def _add(self, optimizer: Any, *_: Any) -> None:
        deviation = (self._eta / self.step**0.55) ** 0.5
        for owner in [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
            gradient = owner.grad = owner.grad.contiguous()
            for slot in self._slots.get(id(owner), ()):
                noise = normal_of_elements(self._seed, f"gradient {self.step} of {slot.name}", slot.elements())
                slot.view(gradient).add_(noise, alpha=deviation)


class Sam:
    """Moves weights up the slope of the loss, and back (sharpness-aware minimisation, arXiv:2010.01412).

    The gradient there is what DeepSpeed is given, and none of it passes through here: this one is taken by
    torch.autograd.grad, which runs none of DeepSpeed's hooks. Every process holds the weights in full.

    Args:
        leaves: the tensors that the network computes with.
        radius: the distance.
    """

    def __init__(self, leaves: list[Tensor], radius: float):
        self._leaves, self._radius = leaves, radius
        self._gradients: list[Tensor] = []
        self._before: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient to those that say where up is."""
        found = torch.autograd.grad(loss, self._leaves, allow_unused=True, materialize_grads=True)
        if self._gradients:
            torch._foreach_add_(self._gradients, [each.float() for each in found])
        else:
            self._gradients = [each.float() for each in found]

    @torch.no_grad()
    def climb(self) -> None:
        """Move the weights, by the sum of the gradients over all processes. A collective."""
        flat = torch.cat([each.flatten() for each in self._gradients])
        torch.distributed.all_reduce(flat)
        flat *= self._radius / (torch.linalg.vector_norm(flat) + 1e-12)
        self._gradients, self._before = [], [leaf.detach().clone() for leaf in self._leaves]
        for leaf, way in zip(self._leaves, flat.split([leaf.numel() for leaf in self._leaves]), strict=True):
            leaf.add_(way.view_as(leaf))

    @torch.no_grad()
    def descend(self) -> None:
        """Put the weights back, bit for bit."""
        torch._foreach_copy_(self._leaves, self._before)
        self._before = []


def moments(optimizer: torch.optim.Optimizer) -> list[set[str]]:
    """Names of the states that the optimizer keeps for a parameter, one set for each kind of parameter.

    If a parameter has some of its states but not all, the next step fails.
    """
    momentum = {"momentum_buffer"} if optimizer.defaults.get("momentum") else set()
    match optimizer:
        case Muon():
            return [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]
        case Lion():
            return [{"exp_avg"}]
        case torch.optim.SGD():
            return [momentum]
        case torch.optim.RMSprop():
            return [{"step", "square_avg"} | momentum]
        case Adagrad():
            return [{"step", "sum"}]
        case torch.optim.Adafactor():
            return [{"step", "row_var", "col_var"}, {"step", "variance"}]
        case torch.optim.Adam():  # and AdamW
            return [{"step", "exp_avg", "exp_avg_sq"}]
    return [set()]


class Adagrad(torch.optim.Optimizer):
    """torch's Adagrad, with its state created at the first step.

    torch.optim.Adagrad creates it at construction, so ZeRO, which swaps the parameters afterwards, builds a new
    optimizer from the defaults and loses each group's own weight decay.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "sum": torch.zeros_like(p)}
            adagrad(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["sum"] for p in parameters],
                [self.state[p]["step"] for p in parameters],
                foreach=True,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                lr_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )


class SGD(torch.optim.SGD):
    """torch's SGD, with momentum that starts at zero.

    torch.optim.SGD starts it from the first gradient, and leaves it uninitialised if the device skips that step.
    """

    def _init_group(self, group, params, grads, momentum_buffer_list):
        if group["momentum"]:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return super()._init_group(group, params, grads, momentum_buffer_list)


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2), with decoupled weight decay.

    torch has none, and DeepSpeed's is compiled at first use.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                update = average.lerp(p.grad, 1 - beta1).sign_()
                moved = p.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                _write(p, moved, self.found_inf)
                _write(average, average.lerp(p.grad, 1 - beta2), self.found_inf)


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Overwrite a weight or a state, unless `found_inf` says, on the device, that the step is skipped."""
    if found_inf is None:
        target.copy_(value)
    else:
        torch.where(found_inf > 0, target, value, out=target)


def newton_schulz(update: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix to each matrix in `update` [..., rows, columns], in bf16.

    Quintic iteration and coefficients of Jordan et al. (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16()
    transposed = x.size(-2) > x.size(-1)
    if transposed:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon on the groups marked `use_muon`, AdamW on the others, one learning rate for both.

    torch.optim.Muon takes 2-D parameters only; fused experts [experts, rows, columns] are one matrix per expert, so the
    orthogonalisation here is batched. A matrix's update is scaled by 0.2 sqrt(max(rows, columns)), which matches the
    RMS of AdamW's (Moonlight, arXiv 2502.16982, section 2.2), as torch's `adjust_lr_fn="match_rms_adamw"` does.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, momentum: float, nesterov: bool):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "nesterov": nesterov,
            "weight_decay": 0.0, "use_muon": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            update = self._muon if group["use_muon"] else self._adamw
            for p in group["params"]:
                if p.grad is not None:
                    decayed = p.mul(1 - group["lr"] * group["weight_decay"])
                    _write(p, decayed + update(p, p.grad, group), self.found_inf)

    def _muon(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"].lerp(gradient, 1 - group["momentum"])
        _write(state["momentum_buffer"], buffer, self.found_inf)
        direction = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        scale = 0.2 * max(p.shape[-2:]) ** 0.5
        return newton_schulz(direction).to(p.dtype) * (-group["lr"] * scale)

    def _adamw(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        step = state["step"] + 1
        average = state["exp_avg"].lerp(gradient, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for key, value in (("step", step), ("exp_avg", average), ("exp_avg_sq", square)):
            _write(state[key], value, self.found_inf)
        step = step.double()  # the precision of a Python float
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return average * (-group["lr"] / (1 - beta1**step)) / denominator

"""Initial values of parameters, each a function of (seed, name, shape) only, whatever the device or sharding."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle


def generator(name: str, seed: int) -> torch.Generator:
    """CPU random numbers for the parameter with this name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_value(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    """fp32 CPU tensor: zeros for a bias, ones for any other vector (a norm's weight), else normal(0, std)."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.empty(shape).normal_(0.0, std, generator=generator(name, seed))


def fill(module: nn.Module, seed: int) -> None:
    """Initialise a module that was just built: by its own `init_weights(seed)` or, if it has none, by torch's
    `reset_parameters` of each of its parts, with a generator seeded by (seed, name) only. What a parametrization
    computes from (torch.nn.utils.parametrize) gets the value that gives this weight back."""
    if own := getattr(module, "init_weights", None):
        own(seed)
        return
    reset(module, seed)


def reset(module: nn.Module, seed: int) -> None:
    """torch's own initial values of each part, as `fill` gives them."""
    with torch.random.fork_rng(devices=[]):
        for name, part in module.named_modules():
            if reset := getattr(part, "reset_parameters", None):
                torch.manual_seed(generator(name, seed).initial_seed())
                with parametrize.cached():  # else `reset` would fill a weight that is computed anew at the next use
                    reset()
                    made = {key: getattr(part, key).detach() for key in getattr(part, "parametrizations", ())}
                for key, value in made.items():
                    setattr(part, key, value)


WAYS: dict[str, Callable[..., Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "he_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "he_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "he_uniform_fan_out": partial(nn.init.kaiming_uniform_, nonlinearity="relu", mode="fan_out"),
    "he_normal_fan_out": partial(nn.init.kaiming_normal_, nonlinearity="relu", mode="fan_out"),
    "orthogonal": nn.init.orthogonal_,
    "lsuv": nn.init.orthogonal_,  # before `scale_outputs`
    "truncated_normal": partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
}
"""Initial values of matrices and convolutions by name: arXiv:1312.6120, 1502.01852, and Glorot and Bengio (2010)."""


def fill_by(way: str, module: nn.Module, seed: int) -> None:
    """As `reset`, but for the weights of linear and convolutional layers one of `WAYS`, and 0 for their biases; the way
    `torch` changes nothing."""
    reset(module, seed)
    for name, part in module.named_modules() if way in WAYS else ():
        if isinstance(part, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                WAYS[way](part.weight, generator=generator(name, seed))
                if part.bias is not None:
                    part.bias.zero_()


@torch.no_grad()
def scale_outputs(module: nn.Module, run: Callable[[], object]) -> None:
    """Scale the weights of each linear and convolutional layer so that its outputs have variance 1 (LSUV,
    arXiv:1511.06422), in the order in which they compute. Biases are 0, so that once is enough.

    Args:
        run: a forward pass over some examples.
    """
    hooks: dict[nn.Module, RemovableHandle] = {}

    def scale(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        hooks.pop(layer).remove()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        deviation = output.float().std()
        if not deviation > 0:  # of a constant
            return output
        layer.weight.div_(deviation)
        return output / deviation

    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            hooks[part] = part.register_forward_hook(scale)
    run()
    for hook in hooks.values():
        hook.remove()


def initialise(module: nn.Module, std: float, seed: int) -> None:
    """Fill every parameter of `module` (on a real device) with its `initial_value`.

    A generator fills a tensor on one core only, so for a GPU several parameters are filled in parallel; on a CPU the C
    library would keep the memory that each thread freed.
    """

    def fill(named: tuple[str, Tensor]) -> None:
        name, parameter = named
        with torch.no_grad():  # one generator per thread
            parameter.copy_(initial_value(name, parameter.shape, std, seed))

    if all(parameter.device.type == "cpu" for parameter in module.parameters()):
        for named in module.named_parameters():
            fill(named)
        return
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, module.named_parameters()))

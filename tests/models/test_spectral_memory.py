"""Spectral norms that iterate once per step: the vectors against torch's own, and where they begin."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.init import fill
from models.spectral_memory import SpectralTap, fill_vectors


def network() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Conv2d(2, 6, 3)), nn.Flatten(), nn.Tanh(), spectral_norm(nn.Linear(6, 5)))


def filled(seed: int = 0) -> nn.Module:
    made = network()
    fill(made, seed)
    fill_vectors(made, seed)
    return made


def memory_of(tap: SpectralTap) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in tap.fresh().items()}


def images(number: int) -> Tensor:
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(number))


def vectors(net: nn.Module) -> list[Tensor]:
    return [buffer for _, buffer in net.named_buffers()]


def trained(net: nn.Module, passes: int, after_step: Callable[[], object]) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(passes):  # of the same images: the gradients differ by the vectors alone
            (net(images(step)).square().mean() / passes).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return net


def test_passes_of_a_step_are_one():
    """As torch's own, of one pass in each step: bit for bit, and of four."""
    own = trained(filled(), 1, lambda: None)
    for passes in (1, 4):
        net = filled()
        tap = SpectralTap({"": net})
        trained(net, passes, lambda tap=tap: tap.tell(tap.after_step(memory_of(tap))))
        found, wanted = vectors(net), vectors(own)
        if passes == 1:
            assert all(map(torch.equal, found, wanted))
        assert all(torch.allclose(mine, its, atol=1e-6) for mine, its in zip(found, wanted, strict=True))
    four = vectors(trained(filled(), 4, lambda: None))
    assert not all(torch.allclose(mine, its, atol=1e-4) for mine, its in zip(four, wanted, strict=True))


def test_they_move_in_training_alone_and_go_back_where_they_are_told():
    net = filled()
    tap = SpectralTap({"": net})
    memory, before = memory_of(tap), [vector.clone() for vector in vectors(net)]
    net.eval()(images(0))
    assert all(map(torch.equal, vectors(net), before))
    net.train()(images(0))
    assert not any(map(torch.equal, vectors(net), before))
    tap.tell(memory)  # of a step that was skipped
    assert all(map(torch.equal, vectors(net), before))
    net(images(0))
    assert not any(map(torch.equal, vectors(net), before))
    assert tap.known() == {name: tuple(value.shape) for name, value in memory.items()}
    assert "3.parametrizations.weight.0._v" in memory


def test_all_begins_as_a_function_of_seed_and_name():
    """Whatever numbers the network was built from; and the vectors give the largest singular value."""
    torch.manual_seed(1)
    one = filled()
    torch.manual_seed(2)
    other = filled()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert not torch.equal(filled(1)[3].parametrizations.weight.original, one[3].parametrizations.weight.original)
    plain = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Tanh(), nn.Linear(6, 5))
    fill(plain, 0)
    assert torch.equal(one[3].parametrizations.weight.original, plain[3].weight)
    assert torch.linalg.matrix_norm(one.eval()[3].weight, 2).item() == pytest.approx(1, abs=0.01)


def test_they_stay_in_fp32_where_the_weights_are_in_bf16():
    net = filled().bfloat16()
    tap = SpectralTap({"": net})
    assert net(images(0).bfloat16()).dtype == torch.bfloat16
    assert all(vector.dtype == torch.float32 for vector in vectors(net))
    assert not torch.equal(vectors(net)[0], vectors(net)[0].bfloat16().float())
    assert tap.known().keys() == dict(net.named_buffers()).keys()

"""The latent ODE: equal to an adaptive solver and to each series alone, its bound, and what is given."""

import copy

import pytest
import torch
from torch import distributions as D
from torchdiffeq import odeint

from configs import ConfigError, from_dict, resolve
from models.batch import SeriesBatch
from models.families import build
from models.init import fill
from models.noise import normal
from models.tasks.table import task_of

SMALL = {"family": "latent_ode", "inputs": 2, "latents": 3, "encoder_size": 4, "hidden": 5}


def task(**model):
    return task_of(from_dict({"model": SMALL | model, "data": {"path": "x.parquet"}}))


def network(learned):
    module = build(learned.config.model)
    fill(module, 0)
    return module


def series() -> SeriesBatch:
    """Three series of 6, 6 and 4 times, the third padded, and padding."""
    draw = torch.Generator().manual_seed(0)
    times = torch.rand(4, 6, generator=draw).sort(1).values
    times = times - times[:, :1]
    times[2, 4:] = times[2, 3]
    observed = torch.rand(4, 6, 2, generator=draw) > 0.3
    observed[:, :, 0] |= ~observed[:, :, 1]
    observed[2, 4:] = observed[3] = False
    values = torch.randn(4, 6, 2, generator=draw) * observed
    return SeriesBatch(times, values, observed, torch.tensor([3, 4, 5, -1]))


def test_it_equals_an_adaptive_solver_series_by_series():
    """The encoder's state and the latent one, from each observation to the next."""
    plain, batch, noise = network(task(steps=4)), series(), torch.randn(4, 3)
    times, values, module = batch.times.double(), batch.values.double(), copy.deepcopy(plain).double()
    with torch.no_grad():
        found, mean, log_variance = plain(batch.times, batch.values, batch.observed, noise)
        for row, length in ((0, 6), (2, 4)):
            own = {"rtol": 1e-9, "atol": 1e-9, "method": "dopri5"}
            state, when = torch.zeros(1, 4).double(), times[row, length - 1]
            for place in range(length - 1, -1, -1):
                if times[row, place] < when:
                    span = torch.stack([torch.zeros(()).double(), when - times[row, place]])
                    state = odeint(lambda _, y: module.backwards(y), state, span, **own)[-1]
                    when = times[row, place]
                seen = batch.observed[row, place].double()
                state = module.cell(torch.cat([values[row, place] * seen, seen])[None], state)
            wanted, spread = module.posterior(state).chunk(2, 1)
            assert torch.allclose(mean[row], wanted[0].float(), atol=1e-5)
            assert torch.allclose(log_variance[row], spread[0].float(), atol=1e-5)
            start = wanted + noise[row] * (spread / 2).exp()
            path = odeint(lambda _, y: module.forwards(y), start, times[row, :length], **own)[:, 0]
            assert torch.allclose(found[row, :length], module.head(path).float(), atol=1e-5)


def test_a_series_does_not_depend_on_the_others_or_on_padding():
    module, batch = network(task()), series()
    whole = module(batch.times, batch.values, batch.observed)
    alone = module(batch.times[2:3, :4], batch.values[2:3, :4], batch.observed[2:3, :4])
    assert torch.allclose(whole[0][2, :4], alone[0][0], atol=1e-6)
    assert torch.allclose(whole[1][2], alone[1][0], atol=1e-6)


@pytest.mark.parametrize("given", ["all", "random", "first"])
def test_the_loss_is_the_negative_evidence_lower_bound(given):
    learned, batch = task(given=given, noise=0.3, beta=0.5), series()
    module = network(learned)
    seen = learned.given(batch, 0, "given times")
    found, mean, log_variance = module(batch.times, batch.values, seen, normal(0, batch.example_ids, "latents", (3,)))
    counted = batch.observed & ~seen if given == "first" else batch.observed
    wanted = -(D.Normal(found, 0.3).log_prob(batch.values) * counted).sum((1, 2))
    kl = D.kl_divergence(D.Normal(mean, (log_variance / 2).exp()), D.Normal(0.0, 1.0)).sum(1)
    sums = learned.loss({"model": module}, batch, "model")
    assert (sums.loss.item(), sums.weight.item()) == (pytest.approx((wanted + 0.5 * kl)[:3].sum().item(), rel=1e-5), 3)
    told = learned.metrics({name: value.tolist() for name, value in sums.extra.items()}, 3)
    assert told["kl"] == pytest.approx(kl[:3].mean().item(), rel=1e-5)
    squares = (found - batch.values).square()
    assert told["mse_given"] == pytest.approx(squares[seen].mean().item(), rel=1e-5)
    assert ("mse_hidden" in told) == (given != "all")
    sums.loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())


def test_what_is_given_belongs_to_the_series():
    learned, batch = task(share=0.5), series()
    whole = learned.given(batch, 0, "x")
    part = SeriesBatch(*(each[1:3] for each in (batch.times, batch.values, batch.observed, batch.example_ids)))
    assert torch.equal(learned.given(part, 0, "x"), whole[1:3])
    assert whole.any(2).sum(1).tolist() == [3, 3, 2, 0]
    assert not torch.equal(whole, learned.given(batch, 1, "x"))
    assert task(given="first").given(batch, 0, "x")[:2].any(2).tolist() == [[True] * 3 + [False] * 3] * 2


def test_zero_3_is_refused():
    tree = {"model": SMALL, "data": {"path": "x.parquet"}, "parallel": {"dp": 2, "zero_stage": 3}}
    with pytest.raises(ConfigError, match=r"model\.family=latent_ode as configured trains with ZeRO 0 to 2"):
        resolve(from_dict(tree))


def test_a_share_of_all_is_refused():
    with pytest.raises(ConfigError, match=r"model\.share"):
        task(share=1.0)

"""Neural ODEs: solved as torchdiffeq solves them, with the same gradients in constant memory."""

import math

import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from configs import ConfigError, from_dict, resolve
from models.batch import ImageBatch, RowBatch
from models.families import build
from models.flops import counted_flops
from models.init import fill
from models.tasks.table import task_of

ROWS = {"inputs": 5, "width": 6, "hidden": 9, "outputs": 3}
IMAGES = {"inputs": 64, "channels": 1, "width": 8, "downsample": 1, "outputs": 3}


def config(model, **sections):
    data = {"path": "x.parquet"}
    return from_dict({"model": {"family": "neural_ode"} | model, "data": data, **sections})


def network(**keys) -> nn.Module:
    module = build(config(keys).model)
    fill(module, 0)
    return module


def inputs(keys, count=7) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    shape = (count, 1, 8, 8) if "channels" in keys else (count, 5)
    return torch.randn(shape, generator=draw)


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    module(x).outputs.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@pytest.mark.parametrize("keys", [ROWS, IMAGES], ids=["rows", "images"])
def test_it_is_torchdiffeqs_solution(keys, solver):
    module, x, calls = network(solver=solver, **keys), inputs(keys), 0

    def change(t, y):
        nonlocal calls
        calls += 1
        return module.dynamics(t, y)

    times = torch.linspace(0, 1, 5 if solver == "rk4" else 2)
    end = odeint(change, module.stem(x), times, method=solver, rtol=1e-3, atol=1e-3)[-1]
    found = module(x)
    assert torch.allclose(found.outputs, module.head(end), rtol=1e-5, atol=1e-6)
    assert found.numbers["evaluations"] == calls >= (16 if solver == "rk4" else 8)
    assert not torch.allclose(found.outputs, module.head(module.stem(x)), atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_more_steps_come_nearer_by_the_solvers_order(solver, order):
    """To the matrix exponential, for a linear equation."""
    draw = torch.Generator().manual_seed(1)
    matrix, start = (torch.randn(rows, 6, generator=draw, dtype=torch.float64) for rows in (6, 4))
    exact = start @ torch.linalg.matrix_exp(matrix)
    errors = []
    for steps in (8, 16):
        module = network(solver=solver, steps=steps, **ROWS)
        errors.append((module._solved(lambda t, y: y @ matrix, start) - exact).abs().max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.5)


@pytest.mark.parametrize(
    ("keys", "tolerance"), [(ROWS | {"solver": "dopri5"}, 1e-6), (IMAGES | {"solver": "rk4", "steps": 12}, 0)]
)
def test_the_adjoints_gradients_are_those_of_the_steps(keys, tolerance):
    if tolerance:
        keys = keys | {"rtol": tolerance, "atol": tolerance}
    x = inputs(keys)
    direct, adjoint = (gradients(network(adjoint=way, **keys), x) for way in (False, True))
    assert direct.keys() == adjoint.keys()
    for name, expected in direct.items():
        assert (adjoint[name] - expected).abs().max() < 1e-3 * expected.abs().max(), name


def test_flops_of_fixed_steps_are_counted_without_computing():
    batch = RowBatch(inputs(ROWS), torch.zeros(7, dtype=torch.int64), torch.arange(7))
    asked = {"solver": "rk4", "steps": 3, **ROWS}
    per_change, ends = 2 * (7 * 9 + 9 * 6), 2 * 2 * 5 * 6 + 3 * 2 * 6 * 3
    assert counted_flops(config(asked), batch) == ends + 12 * 3 * per_change
    assert counted_flops(config(asked | {"adjoint": True}), batch) == ends + 12 * 4 * per_change
    with pytest.raises(RuntimeError, match=r"model\.solver=dopri5 chooses its steps: see `evaluations`"):
        counted_flops(config(ROWS), batch)


@pytest.mark.parametrize("adjoint", [False, True])
def test_what_is_not_finite_gives_a_loss_that_is_not(adjoint):
    """A step that the trainer skips, where torchdiffeq would end the run."""
    module = network(**ROWS, adjoint=adjoint)
    found = module(torch.full((2, ROWS["inputs"]), torch.inf)).outputs
    assert found.isnan().all()
    found.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad.isnan().any() for p in module.dynamics.parameters())


def test_evaluations_are_recorded_as_a_mean_over_examples():
    learned = task_of(config(IMAGES))
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    batch = ImageBatch(images, torch.tensor([0, 1, 2, 0, 1, -1, -1]), torch.tensor([0, 1, 2, 3, 4, -1, -1]))
    module = network(**IMAGES)
    sums = [learned.evaluate({"model": module}, batch), learned.loss({"model": module}, batch, "model")]
    calls = module(batch.inputs).numbers["evaluations"].item()
    assert sums[0].extra.keys() == learned.extra.keys()
    extra = {name: sum(each.extra[name] for each in sums).tolist() for name in learned.extra}
    assert learned.metrics(extra, 10)["evaluations"] == pytest.approx(calls)
    assert calls > 7
    assert len(learned.samples({"model": module}, batch).rows) == 7


ZERO = r"model\.family=neural_ode as configured trains with ZeRO 0 to 2\. Nearest that works: set parallel\.zero"
REFUSED = {
    "rows": (IMAGES, {}, r"^model\.channels=1 is for images, but the run learns from rows: leave it out"),
    "adjoint": (ROWS | {"adjoint": True, "solver": "rk4"}, {"parallel": {"zero_stage": 3}}, ZERO),
    "adaptive": (ROWS, {"parallel": {"zero_stage": 3}}, ZERO),
    "halves": (ROWS | {"downsample": 1}, {}, r": model\.downsample applies to images only: set model\.channels"),
    "solver": (ROWS | {"solver": "dopri6"}, {}, r"model\.solver"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "sections", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(model, sections, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config(model, **sections))

"""Gradients by weight: those that autograd gives over all examples at once, and how they vanish in a deep network."""

import json

import pytest
from support import train_in_process
from torch.nn import functional as F

from configs import load
from trainer.checkpoint.export import load_module
from trainer.data.kinds import kind_of
from trainer.run.folder import prepare_run, read_config

DEEP = ["model.hidden=[" + ",".join(["32"] * 12) + "]", "model.init=xavier_uniform", "train.steps=2"]
KINDS = {
    "sigmoid": ["model.activation=sigmoid"],
    "relu": ["model.activation=relu", "model.init=he_uniform"],
    "residual": ["model.activation=sigmoid", "model.residual=true"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, keys in KINDS.items():
        asked = [f"run.root={root}", f"run.name={name}", "tracking.enabled=false", *DEEP, *keys]
        assert train_in_process(prepare_run(load("wine", asked))) == 0
    return root


def told(muster, root, name) -> list[dict]:
    code, out, _ = muster("gradients", name, "--root", str(root), "--json")
    assert code == 0
    return json.loads(out)["weights"]


def test_they_are_autograds(runs, muster):
    found = {each["name"]: each for each in told(muster, runs, "relu")}
    module, _, _ = load_module(runs / "relu", reads=None)
    dataset = kind_of(config := read_config(runs / "relu")).open(config, "held_out")
    batch = dataset.examples(list(range(len(dataset))))
    F.cross_entropy(module(batch.inputs), batch.labels).backward()
    expected = {name: weight for name, weight in module.named_parameters() if weight.ndim == 2}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name]["grad_norm"] == pytest.approx(weight.grad.norm().item(), rel=1e-4)
        assert found[name]["norm"] == pytest.approx(weight.norm().item(), rel=1e-5)


def test_they_vanish_through_sigmoids_and_not_through_relu_or_residual_connections(runs, muster):
    first_to_last = {}
    for name in KINDS:
        first, *_, last = (each["grad_norm"] for each in told(muster, runs, name))
        first_to_last[name] = first / last
    assert first_to_last["sigmoid"] < 1e-5
    assert min(first_to_last["relu"], first_to_last["residual"]) > 1e-2


def test_the_table(runs, muster):
    code, out, _ = muster("gradients", "sigmoid", "--root", str(runs))
    assert code == 0
    assert out.splitlines()[1].split() == ["weight", "gradient", "norm", "weight", "norm"]
    assert len(out.splitlines()) == 2 + 12 + 1
    code, _, err = muster("gradients", "sigmoid", "--root", str(runs), "--step", "7")
    assert (code, "no checkpoint of step 7" in err) == (2, True)

"""The loss around a run's weights: what the checkpoints themselves evaluate to, where the grid meets them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import train_in_process

from configs import ConfigError, load
from models.families import build
from models.init import fill
from trainer.checkpoint.export import load_module
from trainer.observe.landscape import filter_normalised, landscape, principal_plane
from trainer.run.folder import prepare_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Three checkpoints, kept."""
    keys = ["train.steps=15", "checkpoint.every=5", "checkpoint.keep=3", "tracking.enabled=false"]
    made = prepare_run(load("wine", [f"run.root={tmp_path_factory.mktemp('runs')}", *keys]))
    assert train_in_process(made) == 0
    return made


def evaluated(muster, run_dir: Path, step: int) -> float:
    code, out, _ = muster("eval", "wine", "--root", str(run_dir.parent), "--step", str(step), "--json")
    assert code == 0
    return json.loads(out)["loss"]


def test_its_middle_is_the_runs_own_loss(run_dir, muster):
    for dimensions in (1, 2):
        found = landscape(run_dir, dimensions=dimensions, points=5)
        middle = np.array(found.loss)[(2,) * dimensions]
        assert middle == pytest.approx(evaluated(muster, run_dir, 15), rel=1e-6)
        assert np.shape(found.loss) == (5,) * dimensions
        assert len({round(each, 6) for each in np.ravel(found.loss)}) == 5**dimensions


def test_the_plane_of_three_checkpoints_meets_each_of_them(run_dir, muster):
    steps = (5, 10, 15)
    weights = [dict(load_module(run_dir, step, reads=None)[0].named_parameters()) for step in steps]
    (first, second), places, shares = principal_plane([{n: p.detach() for n, p in each.items()} for each in weights])
    assert sum(float((first[name] * second[name]).sum()) for name in first) == pytest.approx(0, abs=1e-9)
    assert shares.sum() == pytest.approx(1)
    for each, (x, y) in zip(weights, places, strict=True):
        for name, weight in each.items():
            there = weights[-1][name] + x * first[name] + y * second[name]
            assert torch.allclose(there.float(), weight, atol=1e-5)
    found = landscape(run_dir, trajectory=True, points=3)
    assert [step for step, *_ in found.path] == [5, 10, 15]
    # Around each checkpoint, a plane of three points: its corner is the checkpoint.
    xs = sorted({round(x, 12) for _, x, _ in found.path})
    assert found.axes[0][0] < xs[0]
    assert found.axes[0][-1] > xs[-1]
    from trainer.observe import landscape as module

    loss_at, count = module._losses(*load_module(run_dir, reads=None)[:2], [first, second], 1000)
    assert count == 44
    for step, place in zip(steps, places, strict=True):
        assert loss_at(place) == pytest.approx(evaluated(muster, run_dir, step), rel=1e-5)


@pytest.mark.parametrize("preset", ["digits-convnet", "quickstart"])
def test_each_filter_of_a_direction_is_as_large_as_the_weights(preset):
    config = load(preset, ["model.vocab_size=64"] if preset == "quickstart" else [])
    module = build(config.model)
    fill(module, 3)
    found = filter_normalised(module, 0)
    assert found.keys() == {name for name, weight in module.named_parameters() if weight.ndim > 1}
    other = filter_normalised(module, 1)
    for name, weight in module.named_parameters():
        if name in found:
            flat = (
                each.flatten(0, 1) if each.ndim == 3 else each.flatten(1) for each in (found[name], weight, other[name])
            )
            mine, own, another = flat
            assert torch.allclose(mine.norm(dim=-1), own.norm(dim=-1), rtol=1e-4)
            assert not torch.allclose(mine, another)


def test_the_command_draws_it(run_dir, muster):
    root = ["--root", str(run_dir.parent)]
    code, out, err = muster("landscape", "wine", "--trajectory", "--points", "3", *root)
    assert (code, err) == (0, "")
    assert out == f"{run_dir}/plots/landscape.png and landscape.json: step 15\n"
    assert (run_dir / "plots" / "landscape.png").stat().st_size > 10_000
    kept = json.loads((run_dir / "plots" / "landscape.json").read_text())
    assert kept["path"][-1] == [15, 0.0, 0.0]
    code, out, _ = muster("landscape", "wine", "--dimensions", "1", "--points", "3", "--json", "--span", "1e5", *root)
    assert code == 0
    assert len(json.loads(out)["loss"]) == 3


def test_wrong_requests_are_refused(run_dir, muster):
    root = ["--root", str(run_dir.parent)]
    for words, message in (
        (["--step", "7"], "has no checkpoint of step 7"),
        (["--step", "10", "--trajectory"], "has checkpoints at steps 5, 10, and a trajectory needs three"),
        (["--ema"], "has no EMA weights"),
        (["--dimensions", "3"], "--dimensions"),
    ):
        code, _, err = muster("landscape", "wine", *words, *root)
        assert code == 2
        assert message in err


def test_checkpoints_on_a_line_make_no_plane():
    line = [{"weight": torch.tensor([float(i), 0.0])} for i in range(4)]
    with pytest.raises(ConfigError, match="along one direction at most"):
        principal_plane(line)

"""Runs that keep an average of weights: what is saved, measured, drawn and said of it, and where it begins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plugin_runs import STEPS, drawn, make, read_with_plugins
from support import train_in_process

from configs import ConfigError
from models.tasks.table import task_of
from trainer.checkpoint.export import load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.data.kinds import kind_of
from trainer.observe.samples import grid
from trainer.record.lines import read_events, read_metrics


def average(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    reader = Reader(folder(run_dir, step))
    return {name: reader.read("ema", name) for name in reader.averaged}


def test_it_is_of_the_phase_that_asks_for_it(clean):
    """Of the generator, whose weights change at steps 2, 4 and 6."""
    run_dir = clean["small_gan"]
    weights = {step: Reader(folder(run_dir, step)) for step in (2, 4)}
    before, after, still = (average(run_dir, step) for step in (2, 4, 5))
    assert set(after) == {name for name in weights[4].manifest.shapes["weight"] if name.startswith("generator.")}
    for name, found in after.items():
        share = 1 - min(0.4, (1 + 4) / (10 + 4))
        wanted = before[name] + share * (weights[4].read("weight", name) - before[name])
        assert torch.allclose(found, wanted, atol=1e-7)
        assert torch.equal(found, still[name])
    assert Reader(folder(clean["small_convnet"], STEPS)).averaged == set()


def test_running_statistics_are_averaged_with_the_weights_they_belong_to(clean):
    run_dir, name = clean["small_gan"], "generator.1.running_mean"
    before, now, still = (Reader(folder(run_dir, step)).manifest.state.memory for step in (2, 4, 5))
    assert {key for key in now if key.startswith("ema.")} == {f"ema.{name}", "ema.generator.1.running_var"}
    old, new, found = (torch.tensor(rows, dtype=torch.float64) for rows in (
        before[f"ema.{name}"], now[name], now[f"ema.{name}"],
    ))  # fmt: skip
    assert torch.allclose(found, old + (1 - (1 + 4) / (10 + 4)) * (new - old), atol=1e-12)
    assert not torch.allclose(found, new, atol=1e-6)
    assert still[f"ema.{name}"] == now[f"ema.{name}"]
    assert still[name] != now[name]  # it is passed through in every step
    module, _, _ = load_module(run_dir, step=4, reads=None, ema=True)
    assert torch.equal(module.generator[1].running_mean.double(), found[0].float().double())


def test_samples_are_drawn_with_it(clean):
    run_dir, config = clean["small_gan"], read_with_plugins(clean["small_gan"])
    with Image.open(drawn(run_dir)) as image:
        found = np.asarray(image)

    def others(ema: bool) -> float:
        """Share of the pixels that are not those drawn."""
        module, _, _ = load_module(run_dir, reads=None, ema=ema)
        with kind_of(config).shown(run_dir, config, kind_of(config).open(config, "held_out")) as batch, torch.no_grad():
            sample = task_of(config).samples({"generator": module.generator}, batch)
        return float((grid(sample.images_NCHW)[0].numpy() != found).mean())

    assert others(ema=True) < 0.001
    assert others(ema=False) > 0.02


def test_an_evaluation_measures_both_weights(clean, muster):
    [record] = [m for m in read_metrics(clean["small_gan"]) if "eval_loss" in m]
    assert abs(record["eval_loss"] - record["eval_loss_ema"]) > 1e-4
    code, out, _ = muster("eval", str(clean["small_gan"]), "--sequences", "5", "--json", "--ema")
    assert (code, json.loads(out)["loss"]) == (0, pytest.approx(record["eval_loss_ema"], rel=1e-6))
    assert not any("ema" in key for m in read_metrics(clean["small_convnet"]) for key in m)


def test_a_run_without_one_has_none_to_give(clean, muster):
    code, _, err = muster("eval", str(clean["small_convnet"]), "--ema")
    assert code == 2
    assert (
        f"the checkpoint of step {STEPS} of {clean['small_convnet']} has no EMA weights: leave it out, or train with"
        in err
    )
    with pytest.raises(ConfigError, match="has no EMA weights"):
        load_module(clean["small_convnet"], reads=None, ema=True)


def test_a_run_begins_and_ends_one_as_it_goes_on(tmp_path, images):
    """The trained weights know nothing of it."""

    def on_to(step: int, decay: float | None) -> Path:
        run_dir = make("small_convnet", tmp_path, images, train={"steps": step}, optim={"ema_decay": decay})
        assert train_in_process(run_dir) == 0
        return run_dir

    run_dir = on_to(2, None)
    on_to(3, 0.2)
    reader, before = Reader(folder(run_dir, 3)), Reader(folder(run_dir, 2))
    one, other = (where.manifest.state.memory["1.running_mean"][0][0] for where in (before, reader))
    assert reader.manifest.state.memory["ema.1.running_mean"][0][0] == pytest.approx(one + 0.8 * (other - one))
    for name, found in average(run_dir, 3).items():
        old, new = before.read("weight", name), reader.read("weight", name)
        assert torch.allclose(found, old + 0.8 * (new - old), atol=1e-7)
    assert reader.averaged == before.manifest.shapes["weight"].keys()
    on_to(4, None)
    assert Reader(folder(run_dir, 4)).averaged == set()
    assert not any(name.startswith("ema.") for name in Reader(folder(run_dir, 4)).manifest.state.memory)
    assert [(event["step"], event["reason"]) for event in read_events(run_dir) if event["event"] == "ema_changed"] == [
        (2, "the checkpoint has no average of the weights: the average starts from its weights"),
        (3, "the checkpoint's average of the weights is not used: neither optim.ema_decay nor optim.swa_from is set"),
    ]

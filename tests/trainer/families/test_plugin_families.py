"""Families and tasks that a plugin brings: a classifier with BatchNorm, and a GAN whose two networks take turns."""

import csv
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import kill_at_step, spoil_phase, trained
from PIL import Image
from plugin_runs import MODELS, STEPS, drawn, examples, make, numbers, read_with_plugins, state
from support import resolved, train_in_process
from syncs import watch_syncs
from teams import in_team

from configs import ConfigError
from models.flops import counted_flops, flops_of_example
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.data.kinds import SHOWN, kind_of
from trainer.record.lines import read_events, read_metrics

SLOW = pytest.mark.slow
FAMILIES = pytest.mark.parametrize("family", MODELS)


@FAMILIES
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, images, clean, family):
    run_dir = make(family, tmp_path, images, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean[family])
    assert numbers(run_dir) == numbers(clean[family])


ZERO = [("small_convnet", 1), ("small_gan", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
    ("small_convnet", 0), ("small_convnet", 2), ("small_convnet", 3), ("small_gan", 0), ("small_gan", 1),
])]  # fmt: skip


@pytest.mark.parametrize(("family", "zero"), ZERO)
def test_two_processes_measure_what_one_does(tmp_path, images, clean, family, zero):
    run_dir = make(family, tmp_path, images, parallel={"dp": 2, "zero_stage": zero})
    assert in_team(2, trained, run_dir) == ["FINISHED", "FINISHED"]
    mine, one = numbers(run_dir), numbers(clean[family])
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in one]
    assert [entry[2] for entry in mine] == pytest.approx([entry[2] for entry in one], rel=1e-5, abs=1e-9)
    # After one step, from the same weights, bit for bit: though each process saw half of the micro-batches.
    found, expected = (Reader(folder(where, 1)).manifest.state.memory for where in (run_dir, clean[family]))
    assert found == expected
    spectral = ["_u", "_v"] if family == "small_gan" else []
    assert sorted({name.rpartition(".")[2] for name in found}) == [*spectral, "running_mean", "running_var"]
    assert any(any(rows[0]) for name, rows in found.items() if name.endswith("mean"))


def test_a_classifier_shows_a_table(clean):
    config = read_with_plugins(clean["small_convnet"])
    opened = kind_of(config).open(config, "held_out")
    with drawn(clean["small_convnet"]).open() as file:
        rows = list(csv.DictReader(file))
    batch = opened.examples(range(len(rows)))
    assert [(int(row["example"]), int(row["label"])) for row in rows] == list(enumerate(batch.labels.tolist()))
    # 5 were evaluated: of a run that has learned something, their accuracy is that of the rows.
    right = [row["label"] == row["found"] for row in rows[:5]]
    assert [sum(right) / 5] == [
        m["eval_accuracy"] for m in read_metrics(clean["small_convnet"]) if "eval_accuracy" in m
    ]


def test_a_gan_shows_a_grid_of_images(clean):
    with Image.open(drawn(clean["small_gan"])) as image:
        pixels = np.asarray(image)
    config = read_with_plugins(clean["small_gan"])
    count = min(SHOWN, len(kind_of(config).open(config, "held_out")))
    across = math.ceil(count**0.5)
    assert pixels.shape == (math.ceil(count / across) * 13 - 1, across * 13 - 1)
    assert not pixels[12::13].any()
    assert pixels[:12, :12].std() > 1


@pytest.mark.parametrize(
    "topology", [{"zero_stage": 0}, *(pytest.param({"dp": 2, "zero_stage": z}, marks=SLOW) for z in (0, 1, 2, 3))]
)
def test_what_nothing_trains_is_kept_too(tmp_path, images, clean, topology):
    """From the weights of another run, through a stop at a step, to an end with the very same."""
    start = {"init_from": str(clean["small_convnet"])}
    run_dir = make("small_convnet", tmp_path, images, model={"frozen": 1}, train=start, parallel=topology)
    world = topology.get("dp", 1)
    assert in_team(world, trained, run_dir, kill_at_step, [0], 3, signal.SIGTERM) == ["STOPPED"] * world
    assert in_team(world, trained, run_dir) == ["FINISHED"] * world
    before, after = Reader(folder(clean["small_convnet"], STEPS)), Reader(folder(run_dir, STEPS))
    names = set(before.manifest.shapes["weight"])
    assert {n for n in names if torch.equal(before.weight(n), after.weight(n))} == {"0.weight", "1.weight", "1.bias"}
    assert names == set(after.manifest.shapes["weight"])


def test_a_run_begins_from_another_of_its_family(tmp_path, images, clean):
    source = str(clean["small_convnet"])
    run_dir = make("small_convnet", tmp_path, images, train={"init_from": source, "steps": 1}, optim={"lr": 1e-12})
    assert train_in_process(run_dir) == 0
    before, after = Reader(folder(clean["small_convnet"], STEPS)), Reader(folder(run_dir, 1))
    assert all(torch.allclose(after.weight(n), before.weight(n), atol=1e-9) for n in before.manifest.shapes["weight"])
    old, new = (where.manifest.state.memory["1.running_mean"][0] for where in (before, after))
    moved = [abs(a - b) for a, b in zip(new, old, strict=True)]
    assert 0 < max(moved) < 0.2 * max(map(abs, old))  # a tenth of the way to what one step has measured


WRONG_STARTS = {
    "another family": ("small_gan", {}, r"has model\.family=small_convnet, but this run has small_gan"),
    "another shape": ("small_convnet", {"model": {"width": 16}}, r"the model's is \[16, 1, 3, 3\]: set model\.width=8"),
    "no MLPs": (
        "small_convnet",
        {"train": {"upcycle": {}}},
        r"train\.upcycle makes experts of a decoder's MLPs, but model",
    ),
}


@pytest.mark.parametrize(("family", "sections", "message"), WRONG_STARTS.values(), ids=WRONG_STARTS)
def test_a_start_that_does_not_fit_is_refused(tmp_path, images, clean, family, sections, message):
    sections = sections | {"train": sections.get("train", {}) | {"init_from": str(clean["small_convnet"])}}
    with pytest.raises(ConfigError, match=message):
        make(family, tmp_path, images, **sections)


BF16 = [
    ("small_gan", 0),
    *(pytest.param(*case, marks=SLOW) for case in [("small_convnet", 0), ("small_convnet", 1), ("small_gan", 1)]),
]


@pytest.mark.parametrize(("family", "zero"), BF16)
def test_bf16_measures_nearly_what_fp32_does(tmp_path, images, clean, family, zero):
    precision = {"train": {"precision": "bf16"}, "parallel": {"zero_stage": zero}}
    run_dir = make(family, tmp_path, images, **precision)
    assert train_in_process(run_dir) == 0

    def losses(where: Path) -> list[float]:
        return [m[key] for m in read_metrics(where) for key in ("loss", "loss_generator", "eval_loss") if key in m]

    assert losses(run_dir) == pytest.approx(losses(clean[family]), rel=0.03)
    assert losses(run_dir) != losses(clean[family])


def test_phases_take_their_turns(clean):
    steps = [m for m in read_metrics(clean["small_gan"]) if "loss" in m]
    assert ["loss_generator" in m for m in steps] == [False, True] * 3
    assert [m["lr"] / m["lr_generator"] for m in steps] == pytest.approx([2.0] * STEPS)
    manifest = Reader(folder(clean["small_gan"], STEPS)).manifest
    assert manifest.scalars == {"discriminator.step": 6.0, "generator.step": 3.0}
    assert {name.partition(".")[0] for name in manifest.shapes["weight"]} == {"discriminator", "generator"}


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_phase_skips_a_step_that_is_not_finite(tmp_path, images, zero):
    run_dir = make("small_gan", tmp_path, images, parallel={"zero_stage": zero})
    assert train_in_process(run_dir, spoil_phase, "generator", 4) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "skipped_step"] == [4]
    before, after, end = (Reader(folder(run_dir, step)) for step in (2, 4, 6))

    def same(one: Reader, other: Reader, network: str) -> list[bool]:
        names = [name for name in one.manifest.shapes["weight"] if name.startswith(network)]
        return [torch.equal(one.weight(name), other.weight(name)) for name in names]

    assert all(same(before, after, "generator"))
    assert not any(same(before, after, "discriminator"))
    assert not any(same(after, end, "generator"))


@FAMILIES
def test_a_step_waits_for_nothing_but_the_one_before(tmp_path, images, family):
    run_dir = make(family, tmp_path, images, checkpoint={"every": 0})
    assert train_in_process(run_dir, watch_syncs, 3, 5, tmp_path / "syncs") == 0
    assert json.loads((tmp_path / "syncs").read_text()) == {"trainer/late.py tolist: tolist": 2}


def test_flops_are_those_of_the_layers(images, tmp_path, clean):
    config = read_with_plugins(clean["small_convnet"])
    # 12 x 12 pixels to 6 x 6 of 8 channels, to 3 x 3 of 16, to 3 classes; the first layer hands no gradient on.
    first, others = 2 * 36 * 8 * 9, 2 * (9 * 16 * 8 * 9 + 16 * 3)
    assert flops_of_example(config, lambda: examples(config)) == 2 * first + 3 * others
    [event] = [m for m in read_metrics(clean["small_convnet"]) if m["step"] == 3]
    assert (event["images"], event["examples"], event["images_per_second"]) == (48, 48, 16 / event["step_time"])
    assert [m["eval_images"] for m in read_metrics(clean["small_convnet"]) if "eval_loss" in m] == [5]
    assert not any("token" in key or "sequence" in key for m in read_metrics(clean["small_convnet"]) for key in m)
    assert event["tflops"] == pytest.approx((2 * first + 3 * others) * 16 / event["step_time"] / 1e12)


def test_counted_flops_of_a_decoder_are_its_formula():
    config = resolved(model={"num_experts": 0, "num_layers": 2}, train={"seq_len": 32})
    from engines import batch_of

    counted = counted_flops(config, batch_of(config, [0, 1]))
    model, length = config.model, config.train.seq_len
    # The counter takes causal attention for the whole square: what lies above the diagonal comes off.
    above = 3 * 4 * model.num_heads * model.head_dim * model.num_layers * length * (length - 1) / 2
    assert flops_of_example(config, lambda: None) == pytest.approx(counted - above)


def test_mfu_is_flops_over_the_peak(clean, monkeypatch):
    from trainer.record import measure

    config = read_with_plugins(clean["small_convnet"])
    monkeypatch.setattr(measure, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    found = measure.step_metrics(
        config, _Silent(), measure.TrainState(step=1), _Silent(), 0.1, 2.0, 0.0, 1e6, torch.device("cpu")
    )
    assert found["tflops"] * 1e12 == 1e6 * 16 / 2.0 / 2
    assert found["mfu"] == found["tflops"] * 1e12 / 1e9


class _Silent:
    """A learner, and an outcome, with nothing to tell."""

    task = type("task", (), {"counts": (1, "images"), "example": "examples"})
    phases = ()
    loss, grad_norm, weight, extra, rank_time, skipped = 1.0, 1.0, 16, {}, (), False

    def metrics(self, *_: Any) -> dict[str, Any]:
        return {}

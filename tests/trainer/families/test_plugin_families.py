"""Families and tasks that a plugin brings: a classifier with BatchNorm, and a GAN whose two networks take turns."""

import csv
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import kill_at_step, spoil_phase, trained
from pictures import write_images
from PIL import Image
from support import resolved, train_in_process
from sweeps import begun
from sweeps import trained as as_trained
from syncs import watch_syncs
from teams import in_team
from tracker import kept_files, recorded, shown

from cluster import cli
from cluster.sweep.design.plan import plan
from cluster.sweep.results.collect import collect, known_plan
from cluster.sweep.train.progress import write_plan
from cluster.sweep.train.setting import Setting
from configs import Config, ConfigError, from_dict, load
from configs.load import dump_yaml
from configs.sweep.definition import sweep_from_dict
from models.flops import counted_flops, flops_of_example
from models.tasks.table import TASKS
from models.tasks.task import Phase
from trainer.checkpoint.export import load_module
from trainer.checkpoint.store import Reader, folder
from trainer.data.kinds import SHOWN, kind_of
from trainer.record.lines import read_events, read_metrics
from trainer.run.check import check_model
from trainer.run.folder import prepare_run, read_config
from trainer.run.plugins import with_plugins
from trainer.tracking.shipper import ship

PLUGINS = Path(__file__).parents[2] / "helpers" / "plugins"
MODELS: dict[str, dict[str, Any]] = {
    "convnet": {"classes": 3, "width": 8},
    "gan": {"width": 8, "generator_every": 2},
}
STEPS = 6
SLOW = pytest.mark.slow
FAMILIES = pytest.mark.parametrize("family", MODELS)


def tree(family: str, root: Path, images: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Six steps of four micro-batches."""
    found: dict[str, Any] = {
        "run": {"name": family, "root": str(root)},
        "plugins": [str(PLUGINS / f"{family}.py")],
        "model": {"family": family} | MODELS[family],
        "data": {"path": str(images), "images": {"channels": 1}},
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "precision": "fp32", "eval_sequences": 5},
        "optim": {"lr": 0.01},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    for section, keys in sections.items():
        found[section] = {**found[section], **keys} if section in found else keys
    return found


def make(family: str, root: Path, images: Path, **sections: dict[str, Any]) -> Path:
    return prepare_run(from_dict(tree(family, root, images, **sections)))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images.parquet")


@pytest.fixture(scope="module")
def clean(tmp_path_factory, images) -> dict[str, Path]:
    """A run of each family, never stopped, in one process."""
    runs = {family: make(family, tmp_path_factory.mktemp("clean"), images) for family in MODELS}
    for run_dir in runs.values():
        assert train_in_process(run_dir) == 0
    return runs


MEASURED = (
    "loss",
    "grad_norm",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "fooled",
    "eval_fooled",
    "loss_generator",
    "grad_norm_generator",
)


def numbers(run_dir: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all that a run measured, as it was measured last."""
    last = {(m["step"], key): m[key] for m in read_metrics(run_dir) for key in MEASURED if key in m}
    return [(*key, value) for key, value in sorted(last.items())]


def state(run_dir: Path, step: int = STEPS) -> dict[Any, Any]:
    """All that the next step depends on."""
    reader = Reader(folder(run_dir, step))
    tensors = {(k, n): reader.read(k, n).numpy().tobytes() for k in reader.states for n in reader.manifest.shapes[k]}
    found = reader.manifest.state
    return tensors | reader.manifest.scalars | found.memory | {"cursor": found.cursor, "networks": found.networks}


@FAMILIES
def test_a_run_ends_bit_for_bit_the_same_after_a_kill(tmp_path, images, clean, family):
    run_dir = make(family, tmp_path, images, checkpoint={"background": False})
    assert train_in_process(run_dir, kill_at_step, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_in_process(run_dir) == 0
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resumed"] == [3]
    assert state(run_dir) == state(clean[family])
    assert numbers(run_dir) == numbers(clean[family])


ZERO = [("convnet", 1), ("gan", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
    ("convnet", 0), ("convnet", 2), ("convnet", 3), ("gan", 0), ("gan", 1),
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
    assert sorted({name.rpartition(".")[2] for name in found}) == ["running_mean", "running_var"]
    assert any(any(rows[0]) for name, rows in found.items() if name.endswith("mean"))


def drawn(run_dir: Path) -> Path:
    """The file that the evaluation at the end of a run names."""
    [event] = [event for event in read_events(run_dir) if event["event"] == "evaluation"]
    [name] = event["files"]
    return run_dir / "samples" / name


def test_a_classifier_shows_a_table(clean):
    config = read_with_plugins(clean["convnet"])
    opened = kind_of(config).open(config, "held_out")
    with drawn(clean["convnet"]).open() as file:
        rows = list(csv.DictReader(file))
    batch = opened.examples(range(len(rows)))
    assert [(int(row["example"]), int(row["label"])) for row in rows] == list(enumerate(batch.labels.tolist()))
    # 5 were evaluated: of a run that has learned something, their accuracy is that of the rows.
    right = [row["label"] == row["found"] for row in rows[:5]]
    assert [sum(right) / 5] == [m["eval_accuracy"] for m in read_metrics(clean["convnet"]) if "eval_accuracy" in m]


def test_a_gan_shows_a_grid_of_images(clean):
    with Image.open(drawn(clean["gan"])) as image:
        pixels = np.asarray(image)
    config = read_with_plugins(clean["gan"])
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
    start = {"init_from": str(clean["convnet"])}
    run_dir = make("convnet", tmp_path, images, model={"frozen": 1}, train=start, parallel=topology)
    world = topology.get("dp", 1)
    assert in_team(world, trained, run_dir, kill_at_step, [0], 3, signal.SIGTERM) == ["STOPPED"] * world
    assert in_team(world, trained, run_dir) == ["FINISHED"] * world
    before, after = Reader(folder(clean["convnet"], STEPS)), Reader(folder(run_dir, STEPS))
    names = set(before.manifest.shapes["weight"])
    assert {n for n in names if torch.equal(before.weight(n), after.weight(n))} == {"0.weight", "1.weight", "1.bias"}
    assert names == set(after.manifest.shapes["weight"])


def test_a_run_begins_from_another_of_its_family(tmp_path, images, clean):
    source = str(clean["convnet"])
    run_dir = make("convnet", tmp_path, images, train={"init_from": source, "steps": 1}, optim={"lr": 1e-12})
    assert train_in_process(run_dir) == 0
    before, after = Reader(folder(clean["convnet"], STEPS)), Reader(folder(run_dir, 1))
    assert all(torch.allclose(after.weight(n), before.weight(n), atol=1e-9) for n in before.manifest.shapes["weight"])
    old, new = (where.manifest.state.memory["1.running_mean"][0] for where in (before, after))
    moved = [abs(a - b) for a, b in zip(new, old, strict=True)]
    assert 0 < max(moved) < 0.2 * max(map(abs, old))  # a tenth of the way to what one step has measured


WRONG_STARTS = {
    "another family": ("gan", {}, r"is of model\.family=convnet, this run's is gan"),
    "another shape": ("convnet", {"model": {"width": 16}}, r"the model's is \[16, 1, 3, 3\]: set model\.width=8"),
    "no MLPs": ("convnet", {"train": {"upcycle": {}}}, r"train\.upcycle makes experts of a decoder's MLPs, model"),
}


@pytest.mark.parametrize(("family", "sections", "message"), WRONG_STARTS.values(), ids=WRONG_STARTS)
def test_a_start_that_does_not_fit_is_refused(tmp_path, images, clean, family, sections, message):
    sections = sections | {"train": sections.get("train", {}) | {"init_from": str(clean["convnet"])}}
    with pytest.raises(ConfigError, match=message):
        make(family, tmp_path, images, **sections)


BF16 = [("gan", 0), *(pytest.param(*case, marks=SLOW) for case in [("convnet", 0), ("convnet", 1), ("gan", 1)])]


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
    steps = [m for m in read_metrics(clean["gan"]) if "loss" in m]
    assert ["loss_generator" in m for m in steps] == [False, True] * 3
    assert [m["lr"] / m["lr_generator"] for m in steps] == pytest.approx([2.0] * STEPS)
    manifest = Reader(folder(clean["gan"], STEPS)).manifest
    assert manifest.scalars == {"discriminator.step": 6.0, "generator.step": 3.0}
    assert {name.partition(".")[0] for name in manifest.shapes["weight"]} == {"discriminator", "generator"}


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_phase_skips_a_step_that_is_not_finite(tmp_path, images, zero):
    run_dir = make("gan", tmp_path, images, parallel={"zero_stage": zero})
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
    config = read_with_plugins(clean["convnet"])
    # 12 x 12 pixels to 6 x 6 of 8 channels, to 3 x 3 of 16, to 3 classes; the first layer hands no gradient on.
    first, others = 2 * 36 * 8 * 9, 2 * (9 * 16 * 8 * 9 + 16 * 3)
    assert flops_of_example(config, lambda: examples(config)) == 2 * first + 3 * others
    [event] = [m for m in read_metrics(clean["convnet"]) if m["step"] == 3]
    assert (event["images"], event["examples"], event["images_per_second"]) == (48, 48, 16 / event["step_time"])
    assert [m["eval_images"] for m in read_metrics(clean["convnet"]) if "eval_loss" in m] == [5]
    assert not any("token" in key or "sequence" in key for m in read_metrics(clean["convnet"]) for key in m)
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

    config = read_with_plugins(clean["convnet"])
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


def read_with_plugins(run_dir: Path) -> Config:
    return with_plugins(read_config(run_dir))


def examples(config: Config) -> Any:
    opened = kind_of(config).open(config, "train")
    assert opened
    return opened.examples([0, 1])


REFUSED = {
    "ZeRO-3 and two engines": ("gan", {"parallel": {"zero_stage": 3}}, r"parallel\.zero_stage=3: .* 2 phases"),
    "a cut": ("convnet", {"parallel": {"tp": 2}}, r"model\.family=convnet cannot be split by tp"),
    "padding in a BatchNorm": ("convnet", {"train": {"micro_batch": 5}}, r"train\.micro_batch \(5\) does not divide"),
    "layers computed again": (
        "convnet", {"train": {"activation_checkpointing": "full"}}, r"train\.activation_checkpointing=full: .*convnet",
    ),
    "too few classes": ("convnet", {"model": {"classes": 2}}, r"set model\.classes=3"),
    "a key of another family": ("convnet", {"model": {"num_layers": 2}}, r"unknown key model\.num_layers"),
    "text": ("convnet", {"data": {"path": "stdlib"}}, r"data\.path=stdlib is text, but task=classification"),
    "no file": ("convnet", {"data": {"path": "/no/such.parquet"}}, r"data\.path=/no/such\.parquet does not exist"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "sections", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(tmp_path, images, family, sections, message):
    with pytest.raises(ConfigError, match=message):
        make(family, tmp_path, images, **sections)
    assert not (tmp_path / family).exists()


PHASES = {
    "left out": ((Phase("discriminator", "discriminator"),), r"no phase contains generator\.0\.weight \(6 parameters"),
    "twice": ((Phase("all"), Phase("generator", "generator")), r"phases all and generator share parameters"),
}


@pytest.mark.parametrize(("phases", "message"), PHASES.values(), ids=PHASES)
def test_every_parameter_is_of_one_phase(clean, monkeypatch, phases, message):
    config = read_with_plugins(clean["gan"])
    monkeypatch.setitem(TASKS, "adversarial", type("Other", (TASKS["adversarial"],), {"phases": phases}))
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        check_model(config)


def test_a_task_and_a_family_that_do_not_match(tmp_path, images):
    asked = from_dict(tree("convnet", tmp_path, images) | {"task": "language_modelling"})
    with pytest.raises(ConfigError, match=r"task=language_modelling needs .* tokens .*: set task=classification or"):
        prepare_run(asked)


def test_commands_know_a_plugin(clean, tmp_path, images, capsys):
    file = tmp_path / "convnet.yaml"
    file.write_text(dump_yaml(tree("convnet", tmp_path, images)))
    assert load(file).model.family == "convnet"
    root = str(clean["convnet"].parent)

    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.app([*words])
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    assert "width: 32" in said("config", str(file), "model.width=32")
    planned = json.loads(said("plan", str(file), "--json"))
    assert planned["parameters"] == sum(p.numel() for p in parameters_of(clean["convnet"]))
    assert planned["flops_per_example"] == 2 * 5184 + 3 * 20832
    listed = said("runs", "--root", root)
    assert "convnet" in listed
    assert "96 images" in listed
    assert "tokens" not in listed
    assert "FINISHED" in said("status", str(clean["convnet"]))


def test_a_grid_over_keys_of_a_plugin(tmp_path, images):
    base = tmp_path / "convnet.yaml"
    base.write_text(dump_yaml(tree("convnet", tmp_path, images)))
    axes = {"model.width": [4, 8], "optim.lr": [0.01, 0.02]}
    planned = plan(sweep_from_dict({"name": "widths", "base": str(base), "grid": {}, "axes": axes}), 0)
    assert [trial.name for trial in planned.trials] == [
        "width4-lr0.01", "width4-lr0.02", "width8-lr0.01", "width8-lr0.02",
    ]  # fmt: skip
    assert [trial.counts.total for trial in planned.trials] == [375, 375, 1323, 1323]
    assert planned.trials[-1].flops == (2 * 5184 + 3 * 20832) * 16 * STEPS
    assert [trial.tokens for trial in planned.trials] == [16 * STEPS] * 4
    assert planned.trials[0].resolved.model.width == 4
    bad = {"name": "widths", "base": str(base), "grid": {}, "axes": {"model.widht": [4, 8]}}
    with pytest.raises(ConfigError, match=r"did you mean model\.width\?"):
        plan(sweep_from_dict(bad), 0)


def test_a_fit_reads_parameters_and_examples(tmp_path, images):
    base = tmp_path / "convnet.yaml"
    base.write_text(dump_yaml(tree("convnet", tmp_path, images)))
    tree_of_sweep = {"name": "widths", "root": str(tmp_path), "base": str(base), "grid": {}}
    setting = Setting(sweep_from_dict(tree_of_sweep | {"axes": {"model.width": [4, 8]}}))
    planned, record = setting.plan(), begun(setting.sweep)
    write_plan(setting.sweep_dir, planned)
    for trial, loss in zip(planned.trials, (1.5, 1.0), strict=True):
        as_trained(setting, trial, record, loss=loss)
    table = collect(known_plan(setting.sweep)).counted_as("total")
    assert (table.n.tolist(), table.d.tolist(), table.loss.tolist()) == ([375, 1323], [16 * STEPS] * 2, [1.5, 1.0])
    assert table.c.tolist() == [trial.flops for trial in planned.trials]
    assert "5 held-out examples" in table.recipe[0]


def test_a_tracker_gets_what_is_counted_and_drawn(tmp_path, clean, quiet_shipper):
    run_dir = shutil.copytree(clean["convnet"], tmp_path / "runs" / "convnet")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"(?m)^(tracking:\n  enabled: )false", r"\1true", config))
    assert ship(run_dir).missing is None
    run, points = shown(tmp_path / "runs", run_dir, "images")
    assert points == recorded(run_dir, "images")
    assert run.data.metrics.keys() >= {"images_per_second", "eval_images", "eval_accuracy", "accuracy", "examples"}
    assert f"samples/{drawn(run_dir).name}" in kept_files(run)
    assert ship(run_dir).records == 0


def test_a_classifier_writes_no_text(clean):
    with pytest.raises(ConfigError, match=r"learns task=classification from images: generate and export are of"):
        load_module(clean["convnet"])


@FAMILIES
def test_an_evaluation_of_its_own_finds_what_training_found(clean, muster, family):
    code, out, _ = muster("eval", str(clean[family]), "--sequences", "5", "--json")
    found = json.loads(out)
    [record] = [m for m in read_metrics(clean[family]) if "eval_loss" in m]
    assert (code, found["step"], found["weight"], found["unit"]) == (0, STEPS, record["eval_images"], "images")
    assert found["loss"] == pytest.approx(record["eval_loss"], rel=1e-6)
    assert found["metrics"] == pytest.approx(
        {k: record[f"eval_{k}"] for k in ("accuracy", "fooled") if f"eval_{k}" in record}
    )
    code, out, _ = muster("eval", str(clean[family]), "--sequences", "5")
    assert out.startswith(f"held-out loss {record['eval_loss']:.4f} over 5 images, ")


def test_commands_say_what_they_are_not_for(clean, muster):
    run_dir = str(clean["convnet"])
    assert "data.path=/no/such does not exist" in muster("eval", run_dir, "--data", "/no/such")[2]
    for command in (("data", "show", run_dir, "--step", "1"), ("generate", run_dir, "--prompt", "a")):
        code, _, err = muster(*command)
        assert code == 2
        assert "learns task=classification from images" in err


def parameters_of(run_dir: Path) -> list[torch.Tensor]:
    reader = Reader(folder(run_dir, STEPS))
    return [reader.weight(name) for name in reader.manifest.shapes["weight"]]

"""What the commands, sweeps and records say of families that a plugin brings, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugin_runs import MODELS, STEPS, drawn, make, read_with_plugins, tree
from sweeps import begun
from sweeps import trained as as_trained
from tracker import kept_files, recorded, shown

from cluster import cli
from cluster.sweep.design.plan import plan
from cluster.sweep.design.show import costs, to_json
from cluster.sweep.results.collect import collect
from cluster.sweep.train.progress import write_plan
from cluster.sweep.train.setting import Setting
from configs import ConfigError, from_dict, load
from configs.load import dump_yaml
from configs.sweep.definition import sweep_from_dict
from models.planning.devices import DEVICES
from models.tasks.table import TASKS
from models.tasks.task import Phase
from trainer.checkpoint.export import load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.record.lines import read_metrics
from trainer.run.check import check_model
from trainer.run.folder import prepare_run
from trainer.tracking.shipper import ship

FAMILIES = pytest.mark.parametrize("family", MODELS)


REFUSED = {
    "ZeRO-3 and two engines": ("small_gan", {"parallel": {"zero_stage": 3}}, r"parallel\.zero_stage=3: .* 2 phases"),
    "a cut": ("small_convnet", {"parallel": {"tp": 2}}, r"model\.family=small_convnet cannot be split by tp"),
    "padding in a BatchNorm": (
        "small_convnet",
        {"train": {"micro_batch": 5}},
        r"train\.micro_batch \(5\) does not divide",
    ),
    "layers computed again": (
        "small_convnet",
        {"train": {"activation_checkpointing": "full"}},
        r"train\.activation_checkpointing=full: .*convnet",
    ),
    "too few classes": ("small_convnet", {"model": {"classes": 2}}, r"set model\.classes=3"),
    "a key of another family": ("small_convnet", {"model": {"num_layers": 2}}, r"unknown key model\.num_layers"),
    "text": ("small_convnet", {"data": {"path": "stdlib"}}, r"data\.path=stdlib is text, but task=classification"),
    "no file": (
        "small_convnet",
        {"data": {"path": "/no/such.parquet"}},
        r"data\.path=/no/such\.parquet does not exist",
    ),
}


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
    config = read_with_plugins(clean["small_gan"])
    monkeypatch.setitem(TASKS, "small_game", type("Other", (TASKS["small_game"],), {"phases": phases}))
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        check_model(config)


def test_a_task_and_a_family_that_do_not_match(tmp_path, images):
    asked = from_dict(tree("small_convnet", tmp_path, images) | {"task": "language_modelling"})
    with pytest.raises(ConfigError, match=r"task=language_modelling needs .* tokens .*: set task=classification or"):
        prepare_run(asked)


def test_commands_know_a_plugin(clean, tmp_path, images, capsys):
    file = tmp_path / "convnet.yaml"
    file.write_text(dump_yaml(tree("small_convnet", tmp_path, images)))
    assert load(file).model.family == "small_convnet"
    root = str(clean["small_convnet"].parent)

    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.app([*words])
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    assert "width: 32" in said("config", str(file), "model.width=32")
    planned = json.loads(said("plan", str(file), "--json"))
    assert planned["parameters"] == sum(p.numel() for p in parameters_of(clean["small_convnet"]))
    assert planned["flops_per_example"] == 2 * 5184 + 3 * 20832
    listed = said("runs", "--root", root)
    assert "small_convnet" in listed
    assert "96 images" in listed
    assert "tokens" not in listed
    assert "FINISHED" in said("status", str(clean["small_convnet"]))


def test_a_grid_over_keys_of_a_plugin(tmp_path, images):
    base = tmp_path / "convnet.yaml"
    base.write_text(dump_yaml(tree("small_convnet", tmp_path, images)))
    axes = {"model.width": [4, 8], "optim.lr": [0.01, 0.02]}
    planned = plan(sweep_from_dict({"name": "widths", "base": str(base), "grid": {}, "axes": axes}), 0)
    assert [trial.name for trial in planned.trials] == [
        "width4-lr0.01", "width4-lr0.02", "width8-lr0.01", "width8-lr0.02",
    ]  # fmt: skip
    assert [trial.counts.total for trial in planned.trials] == [375, 375, 1323, 1323]
    assert planned.trials[-1].flops == (2 * 5184 + 3 * 20832) * 16 * STEPS
    assert [trial.tokens for trial in planned.trials] == [16 * STEPS] * 4
    told = to_json(planned, costs(planned, DEVICES["h100"], 1, None))
    assert (told["totals"]["images"], told["trials"][0]["images"]) == (4 * 16 * STEPS, 16 * STEPS)
    assert told["trials"][0]["images_per_parameter"] == 16 * STEPS / 375
    assert "token" not in json.dumps(told)
    assert planned.trials[0].resolved.model.width == 4
    bad = {"name": "widths", "base": str(base), "grid": {}, "axes": {"model.widht": [4, 8]}}
    with pytest.raises(ConfigError, match=r"did you mean model\.width\?"):
        plan(sweep_from_dict(bad), 0)


def test_a_fit_reads_parameters_and_examples(tmp_path, images):
    base = tmp_path / "convnet.yaml"
    base.write_text(dump_yaml(tree("small_convnet", tmp_path, images)))
    tree_of_sweep = {"name": "widths", "root": str(tmp_path), "base": str(base), "grid": {}}
    setting = Setting(sweep_from_dict(tree_of_sweep | {"axes": {"model.width": [4, 8]}}))
    planned, record = setting.plan(), begun(setting.sweep)
    write_plan(setting.sweep_dir, planned)
    setting.write_sweep()
    for trial, loss in zip(planned.trials, (1.5, 1.0), strict=True):
        as_trained(setting, trial, record, loss=loss)
    table = collect(setting.sweep).counted_as("total")
    assert (table.n.tolist(), table.d.tolist(), table.loss.tolist()) == ([375, 1323], [16 * STEPS] * 2, [1.5, 1.0])
    assert table.c.tolist() == [trial.flops for trial in planned.trials]
    assert "5 held-out examples" in table.recipe[0]
    # A page, which loads no plugin, has the same from the sweep's plan.
    for path in (setting.sweep_dir / "trials").glob("*/config.yaml"):
        path.write_text(path.read_text().replace("convnet.py", "gone.py"))
    code = f"""
from cluster.sweep.results.law_page import Folder
from pathlib import Path
import sys
table = Folder(Path({str(setting.sweep_dir)!r}), [Path({str(tmp_path)!r})]).table()
assert "torch" not in sys.modules
print([each.tolist() for each in (table.n, table.d, table.c, table.loss)], list(table.recipe))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    columns = [each.tolist() for each in (table.n, table.d, table.c, table.loss)]
    assert shown.strip() == f"{columns} {list(table.recipe)}"


def test_a_tracker_gets_what_is_counted_and_drawn(tmp_path, clean, quiet_shipper):
    run_dir = shutil.copytree(clean["small_convnet"], tmp_path / "runs" / "small_convnet")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(re.sub(r"(?m)^(tracking:\n  enabled: )false", r"\1true", config))
    assert ship(run_dir).missing is None
    run, points = shown(tmp_path / "runs", run_dir, "images")
    assert points == recorded(run_dir, "images")
    assert run.data.metrics.keys() >= {"images_per_second", "eval_images", "eval_accuracy", "accuracy", "examples"}
    assert f"samples/{drawn(run_dir).name}" in kept_files(run)
    assert ship(run_dir).records == 0


def test_a_classifier_writes_no_text(clean):
    with pytest.raises(ConfigError, match=r"trains task=classification on images: generate and export need"):
        load_module(clean["small_convnet"])


def test_a_family_without_a_hugging_face_architecture_is_not_exported(clean, muster, tmp_path):
    code, _, err = muster("export", str(clean["small_convnet"]), "--out", str(tmp_path / "out"))
    assert (code, "model.family=small_convnet, which has no Hugging Face architecture: " in err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert "export needs one of decoder, encoder, transformers, vit" in err


@FAMILIES
def test_an_evaluation_of_its_own_finds_what_training_found(clean, muster, family):
    code, out, _ = muster("eval", str(clean[family]), "--sequences", "5", "--json")
    found = json.loads(out)
    [record] = [m for m in read_metrics(clean[family]) if "eval_loss" in m]
    assert (code, found["step"], found["weight"], found["unit"]) == (0, STEPS, record["eval_images"], "images")
    assert found["loss"] == pytest.approx(record["eval_loss"], rel=1e-6)
    assert found["metrics"] == pytest.approx(
        {k: record[f"eval_{k}"] for k in ("accuracy", "macro_f1", "fooled") if f"eval_{k}" in record}
    )
    code, out, _ = muster("eval", str(clean[family]), "--sequences", "5")
    assert out.startswith(f"held-out loss {record['eval_loss']:.4f} over 5 images, ")


def test_commands_say_what_they_are_not_for(clean, muster):
    run_dir = str(clean["small_convnet"])
    assert "data.path=/no/such does not exist" in muster("eval", run_dir, "--data", "/no/such")[2]
    for command in (("data", "show", run_dir, "--step", "1"), ("generate", run_dir, "--prompt", "a")):
        code, _, err = muster(*command)
        assert code == 2
        assert "trains task=classification on images" in err


def parameters_of(run_dir: Path) -> list[torch.Tensor]:
    reader = Reader(folder(run_dir, STEPS))
    return [reader.weight(name) for name in reader.manifest.shapes["weight"]]

"""What a sweep is, from YAML and overrides; and what a person reads after a mistake in it."""

import pytest

from configs import ConfigError, load
from configs.load import read_mapping
from configs.sweep.definition import HyperRules, ShapeRule, SweepConfig, load_sweep, nested, sweep_from_dict
from configs.sweep.designs import Axis, IsoflopDesign, LadderDesign, OptunaDesign
from configs.sweep.variants import Experts, Variant

TEXT = """
name: s
set: {train: {seq_len: 128}, optim.weight_decay: 0.05}
isoflop: {budgets: [1e13, 3e13]}
variants: {dense: {}, moe: {experts: [4, 8], granularity: 2}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(TEXT)
    return path


def test_file_and_overrides(file):
    sweep = load_sweep(file, ["isoflop.sizes=7", "axes.optim.lr=[1e-3, 2e-3]", "set.train.seq_len=64", "seeds=3"])
    assert sweep.isoflop.budgets == (1e13, 3e13)
    assert sweep.isoflop.sizes == 7
    assert sweep.axes["optim.lr"].values == (1e-3, 2e-3)
    assert nested(sweep.set) == {"train": {"seq_len": 64}, "optim": {"weight_decay": 0.05}}
    assert sweep.seeds == (3,)
    assert sweep.design is sweep.isoflop
    assert sweep.sizes_chosen
    assert sweep_from_dict(sweep.model_dump(mode="json", exclude_none=True)) == sweep


def test_base_is_taken_from_the_sweeps_file(file):
    (file.parent / "mine.yaml").write_text("base: quickstart\n")
    assert load_sweep(file, ["base=mine.yaml"]).base == str(file.parent / "mine.yaml")
    assert load_sweep(file, ["base=dense-small"]).base == "dense-small"


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({}, {"": None}),
        ({"experts": 8}, {"": Experts(8, 1, 1, 0)}),
        ({"experts": 8, "top_k": 2, "granularity": 4}, {"": Experts(32, 8, 4, 0)}),  # Krajewski et al., section 3
        ({"experts": 8, "sparsity": 0.75}, {"": Experts(8, 2, 1, 0)}),  # Abnar et al.: S = 1 - K / E
        ({"top_k": 2, "sparsity": [0.5, 0.9]}, {"-s0.5": Experts(4, 2, 1, 0), "-s0.9": Experts(20, 2, 1, 0)}),
        ({"experts": 4, "sparsity": 0.875, "granularity": 2}, {"": Experts(8, 1, 2, 0)}),
        ({"experts": [4, 8], "granularity": [1, 2], "shared": 1}, {
            "-e4-g1": Experts(4, 1, 1, 1), "-e8-g1": Experts(8, 1, 1, 1),
            "-e4-g2": Experts(8, 2, 2, 1), "-e8-g2": Experts(16, 2, 2, 1)}),
    ],
)  # fmt: skip
def test_experts_in_the_literatures_words(keys, found):
    assert Variant(**keys).choices() == found


WRONG = {
    "isoflop.budgts=[1]": "unknown key isoflop.budgts: did you mean isoflop.budgets?",
    "sizes=7": "unknown key sizes: did you mean isoflop.sizes?",
    "variants.moe.expertz=3": "unknown key variants.moe.expertz: did you mean variants.moe.experts?",
    "isoflop.budgets=[]": "isoflop.budgets=[]: should have at least 1 value",
    "isoflop.budgets=[-1]": "isoflop.budgets.0=-1: should be greater than 0",
    "isoflop.spread=1": "isoflop.spread=1: should be greater than 1",
    "grid={}": "a sweep has exactly one design of isoflop, ladder, grid, random, optuna: this one has isoflop and grid",
    "isoflop=null": "a sweep has exactly one design of isoflop, ladder, grid, random, optuna: this one has none",
    "name=a/b": "name=\"a/b\": letters, digits, '.', '_' and '-' only, as it names a folder",
    "variants={a b: {}}": "variants={\"a b\": {}}: letters, digits, '.', '_' and '-' only, as it names a folder",
    "variants.moe={experts: 4, top_k: 8}": 'variants.moe={"experts": 4, "top_k": 8}: top_k 8 is more than experts 4',
    "variants.moe={experts: 3, sparsity: 0.5}": 'variants.moe={"experts": 3, "sparsity": 0.5}: top_k for sparsity 0.5, '
    "times granularity 1, is 1.5, not a whole number of at least 1",
    "variants.moe={top_k: 2}": 'variants.moe={"top_k": 2}: top_k, granularity and shared need experts: set experts '
    "or sparsity",
    "variants.moe={experts: 8, top_k: 1, sparsity: 0.5}": 'variants.moe={"experts": 8, "top_k": 1, "sparsity": 0.5}: '
    "sparsity follows from experts and top_k: leave one of the three out",
    "axes.optim.lr={low: 1, high: 2}": "axes.optim.lr is a range, but isoflop needs a list of values, such as [1, 2]",
    "axes.optim.lr={low: 2, high: 1}": 'axes.optim.lr={"low": 2, "high": 1}: low and high should be two numbers, low '
    "below high",
    "axes.optim.lr={low: 0, high: 1, log: true}": 'axes.optim.lr={"low": 0, "high": 1, "log": true}: log: true needs a '
    "range whose low is above 0",
    "axes.optim.lr=3": "axes.optim.lr=3: should be a section of keys: values, low, high, log",
    "rules.lr=steplaw": 'rules.lr="steplaw": should be one of step_law, inverse_width, fixed; did you mean step_law?',
    "rules.schedule=cosin": 'rules.schedule="cosin": should be one of constant, linear, cosine, wsd, wsd_branches; did '
    "you mean cosine?",
    "variants=[dense]": 'variants=["dense"]: should be keys and their values, such as {a: 1}',
    "count=all": 'count="all": should be one of total, active, without_embeddings, with_head',
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG.keys())
def test_wrong_value(file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_sweep(file, [override])
    assert str(caught.value).partition(": ")[2] == message


def test_a_search_needs_axes():
    with pytest.raises(
        ConfigError, match=r"random searches over axes, but there are none: add some, such as axes\.optim\.lr="
    ):
        sweep_from_dict({"random": {"n": 3}})


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"no sweep 'missing\.yaml': expected a YAML file with a design"):
        load_sweep("missing.yaml")
    (tmp_path / "s.yaml").write_text("isoflop: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_sweep(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"'sizes' is not key=value, such as isoflop\.sizes=7"):
        load_sweep(tmp_path / "s.yaml", ["sizes"])
    assert read_mapping(tmp_path / "s.yaml")["name"] == "s"


def test_a_sweep_and_a_runs_config_are_not_taken_for_each_other(file):
    with pytest.raises(ConfigError, match=r"sweep.yaml is a sweep \(it has isoflop\).*`muster sweep run"):
        load(file)
    run = file.with_name("run.yaml")
    run.write_text("train: {steps: 3}")
    with pytest.raises(ConfigError, match=r"run.yaml is a run's config, not a sweep: train it with `muster train"):
        load_sweep(run)


def test_every_key_says_what_it_is():
    sections = [IsoflopDesign, LadderDesign, OptunaDesign, Axis, Variant, ShapeRule, HyperRules, SweepConfig]
    silent = {"Axis.values", "Axis.low", "Axis.high"}  # said by its class
    found = {f"{each.__name__}.{key}" for each in sections for key, f in each.model_fields.items() if not f.description}
    assert found <= silent

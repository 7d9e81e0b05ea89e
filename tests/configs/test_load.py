"""A config from a preset or a file, its base and overrides; written out and read back it is the same."""

import pytest

from configs import Config, ConfigError, flatten, from_dict, load, preset_names, resolve, to_yaml
from configs.sections.data import Source
from models.planning.cost import parameters

SIZES = {  # preset: (total, active per token) in billions of parameters, as its first line says
    "dense-7b": (6.7, 6.7),
    "moe-8x7b": (46.7, 12.9),
    "moe-1b-a300m": (1.1, 0.3),
}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_resolves_and_reads_back(name, tmp_path):
    config = load(name)
    assert config.run.name == name
    resolved, notes = resolve(config, vocab_size=getattr(config.model, "vocab_size", None) or 4096)
    open_values = [key for key, value in flatten(resolved).items() if value is None and key.startswith("model.")]
    none = {"rope_scaling", "sliding_window", "block_sparse", "router_bias_rate", "capacity_factor"}  # None is a value
    none |= {"activation", "norm", "hidden"}  # of a convnet: as its architecture has them
    none |= {"embedding_size"}  # of a recurrent network: as wide as its state
    none |= {"outputs"}  # of a network of tokens: it tells nothing of whole texts
    none |= {"generator_lr", "discriminator_lr"}  # of a GAN: optim.lr
    none |= {"predictor"}  # of self-distillation alone
    none |= {"vit", "convnet.predictor", "text.intermediate_size"}  # of two encoders: one of images, and as it derives
    assert {key.removeprefix("model.") for key in open_values} <= none
    again = resolve(resolved, vocab_size=getattr(resolved.model, "vocab_size", None))
    assert again == (resolved, []), "resolving twice changes nothing"
    assert all("=" in note and ": " in note for note in notes)
    for one in (config, resolved):
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(one))
        assert load(path) == one


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes_are_what_their_name_says(name):
    resolved, _ = resolve(load(name))
    counts = parameters(resolved.model)
    total, active = SIZES[name]
    assert counts.total / 1e9 == pytest.approx(total, rel=0.06)
    assert counts.active / 1e9 == pytest.approx(active, rel=0.06)


def test_presets_of_the_issue_are_there():
    assert set(preset_names()) >= {"quickstart", "dense-small", "moe-1b-a300m", "moe-8x7b", "dense-7b"}


def test_file_over_base_over_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\nrun: {name: mine}\ntrain: {steps: 7, seq_len: 64}\n")
    (tmp_path / "yours.yaml").write_text("base: mine.yaml\ntrain:\n  steps: 8\n")
    quick, yours = load("quickstart"), load(tmp_path / "yours.yaml")
    changed = {key: value for key, value in flatten(yours).items() if flatten(quick)[key] != value}
    assert changed == {"run.name": "mine", "train.steps": 8, "train.seq_len": 64, "optim.warmup": 0}


def test_lists_of_a_file_replace_those_of_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\ntrain: {sample_prompts: [a]}\n")
    assert load(tmp_path / "mine.yaml").train.sample_prompts == ("a",)


def test_empty_file_is_the_default(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=5", "train.steps", 5),
        ("train.steps=1e3", "train.steps", 1000),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=2.5E-4", "optim.lr", 2.5e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("optim.betas=[0.8, 1e-1]", "optim.betas", [0.8, 0.1]),
        ("train.compile=true", "train.compile", True),
        ("train.micro_batch=null", "train.micro_batch", None),
        ("data.prepare.vocab_size=512", "data.prepare.vocab_size", 512),
        ("train.spike.action=rollback", "train.spike.action", "rollback"),
        ("train.sample_prompts=[a b, 'c=d']", "train.sample_prompts", ["a b", "c=d"]),
        ("plugins=[mine.py]", "plugins", ["mine.py"]),
        ("model.rope_scaling={kind: linear, factor: 4}", "model.rope_scaling.factor", 4.0),
        ("model.rope_scaling.factor=8", "model.rope_scaling.factor", 8.0),
        ("run.name=2026-01-05", "run.name", "2026-01-05"),
        ("run.name=007", "run.name", "007"),
        ("run.name=1e3", "run.name", "1e3"),
        ("run.name=on", "run.name", "on"),
        ("data.path=a=b", "data.path", "a=b"),
        ("cluster.address=null", "cluster.address", None),
    ],
)
def test_overrides(override, key, value):
    found = flatten(load("quickstart", [override]))[key]
    assert found == value
    assert type(found) is type(value)


def test_later_override_wins_and_the_rest_stays():
    config = load("quickstart", ["optim.lr=1", "optim.lr=2", "optim={lr: 3, warmup: 4}", "optim.warmup=5"])
    assert (config.optim.lr, config.optim.warmup) == (3.0, 5)
    assert load("quickstart") == load("quickstart"), "overrides do not leak into the preset"


def test_mixture():
    config = load("quickstart", ["data.path=[{path: a, weight: 2}, {path: b}]"])
    assert config.data.path == (Source(path="a", weight=2.0), Source(path="b", weight=1.0))
    assert flatten(config)["data.path"] == [{"path": "a", "weight": 2.0}, {"path": "b", "weight": 1.0}]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=1e-5", "optim.eps=1e-20", "optim.betas=[0.0, 0.999]", "run.name=1e3"],
        ["model.rope_scaling={kind: llama3, factor: 8, original_max_positions: 9}", "data.path=[{path: a, weight: 1}]"],
        ["train.sample_prompts=['', 'class ', \"tab\\there\", 'größe 🙂', 'no', '1e3']", "plugins=[a.b, c/d.py]"],
    ],
)
def test_reads_back_equal(tmp_path, overrides):
    config = load("quickstart", overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(tmp_path / "config.yaml") == config
    assert from_dict(config.model_dump()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 5\n", r"c\.yaml cannot be read as YAML: .*\(line \d, column \d\)"),
        ("train: {steps: 5}\noptim: {lr: 1}\ntrain: {seq_len: 64}\n", r"duplicate key train \(line 3, column 1\)"),
        ("train:\n  steps: 5\n  steps: 6\n", r"duplicate key steps \(line 3, column 3\)"),
        ("- a\n", r"c\.yaml contains a list, not a mapping of sections"),
        ("base: nothing\n", r"no config 'nothing': neither a file nor a preset \(.*quickstart"),
        ("base: c.yaml\n", r"c\.yaml: `base` leads back to this file"),
        ("train:\n", r"c\.yaml: train=null: should be a section of keys: steps, global_batch, micro_batch, "),
    ],
)  # fmt: skip
def test_unreadable_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"run: {name: \xff}")
    with pytest.raises(ConfigError, match=r"cannot be read as YAML: it is not UTF-8 text \(byte 12 is 0xff\)"):
        load(tmp_path / "c.yaml")


def test_misspelt_preset():
    with pytest.raises(ConfigError, match=r"did you mean quickstart\?"):
        load("quikstart")


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load("quickstart").train.steps = 3  # type: ignore[misc]


def test_a_plugins_family_may_have_the_name_of_one_of_ours(tmp_path, monkeypatch):
    from configs.load import with_family
    from configs.sections.family import SECTIONS, ModelSection

    (tmp_path / "mine.yaml").write_text("plugins: [mine.py]\nmodel: {family: mlp, depth: 3}\n")
    monkeypatch.setitem(SECTIONS, "mlp", SECTIONS["mlp"])
    config = load(tmp_path / "mine.yaml")
    assert (config.model.is_known, config.model.depth) == (False, 3)
    with pytest.raises(ConfigError, match=r"unknown key model\.depth"):
        with_family(config)  # the plugin has brought no such family

    class Mine(ModelSection):
        default_task = "counting"
        depth: int = 1

    SECTIONS["mlp"] = Mine
    for found in (with_family(config), load(tmp_path / "mine.yaml")):
        assert (type(found.model), found.model.depth, found.task) == (Mine, 3, "counting")
    with pytest.raises(ConfigError, match=r"unknown key model\.hidden"):
        load(tmp_path / "mine.yaml", ["model.hidden=[3]"])

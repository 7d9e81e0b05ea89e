"""Whatever a config file holds, reading it ends soon: in a config, or in one message that says what is wrong."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from no_hang import ends

from cluster.attempts.launch import launch
from cluster.cli import main
from configs import ConfigError, load, resolve
from configs.reading.parse import MAX_BYTES, MAX_VALUES, parse_json, parse_yaml
from models.planning.devices import DEVICES, cpu
from models.planning.memory import memory
from models.planning.plan import predict
from trainer.record.forecast import refuse_too_large
from trainer.run.folder import prepare_run

ROOT = Path(__file__).parents[3]
BYTES = 500 * 2**20
"""What a command on a hostile file may take."""


def muster(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of ours with that much address space, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True, capture_output=True,
        timeout=600, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES)),
    )  # fmt: skip


def message(done: subprocess.CompletedProcess[str]) -> str:
    """The message that a command ended in. Fails if it did not end in one."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("muster: ")
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) <= 3, done.stderr
    assert max(map(len, lines)) < 600, done.stderr
    return done.stderr


def doubling(first: str, item: str, levels: int = 30) -> str:
    """Anchors of which each names the one before twice."""
    return first + "".join(f"x{i}: &x{i} " + item.replace("@", f"*x{i - 1}") + "\n" for i in range(1, levels))


BOMBS = {
    "lists": doubling("x0: &x0 [1]\n", "[@, @]"),
    "mappings": doubling("x0: &x0 {a: 1}\n", "{a: @, b: @}"),
    "merges": doubling("x0: &x0 {a: 1}\n", "{<<: [@, @], k: 1}"),
    "in a value": doubling("x0: &x0 [1]\n", "[@, @]") + "model: {hidden_size: *x29}\n",
    "deep list": "train: " + "[" * 5000,
    "deep mapping": "train: " + "{a: " * 5000,
    "deep block": "train:\n  " + "- " * 5000 + "x\n",
    "deep by aliases": doubling("x0: &x0 [1]\n", "[@]", 200),
    "many values": "plugins: [" + "a, " * (MAX_VALUES + 1) + "]\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(MAX_VALUES)),
    "many unknown keys": "train:\n" + "".join(f"  stepz{i}: 1\n" for i in range(5000)),
    "many wrong items": "plugins: [" + "1, " * 15000 + "]\n",
    "large": "run: {name: a}\n" + "#" * MAX_BYTES,
    "long key": "train: {? " + "k" * 200_000 + " : 1}\n",
    "long text": 'optim: {name: "' + "x" * 200_000 + '"}\n',
    "long number": "run: {seed: 0x" + "f" * 20_000 + "}\n",
    "sexagesimal": "run: {seed: 1" + ":59" * 100_000 + "}\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once(tmp_path, name):
    (tmp_path / "c.yaml").write_text(BOMBS[name])
    with ends(), pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    assert max(map(len, lines)) < 600


WRONG = {
    "model: &m {rope_scaling: *m}": "an alias refers to its own ancestor",
    "plugins: &m [*m]": "an alias refers to its own ancestor",
    "model: &m {<<: *m}": "an alias refers to its own ancestor",
    "run: {name: !!binary aGVsbG8=}": "the tag 'tag:yaml.org,2002:binary' is not allowed",
    "run: {seed: !!int abc}": "the tag 'tag:yaml.org,2002:int' is not allowed",
    "run: !!python/object:os.system x": "the tag 'tag:yaml.org,2002:python/object:os.system' is not allowed",
    "plugins: !!set {a, b}": "the tag 'tag:yaml.org,2002:set' is not allowed",
    "1: 2": "the key 1 is read as int: quote it",
    "null: 2": "the key null is read as null: quote it",
    "train: {yes: 2}": "the key yes is read as bool: quote it",
    "train: {2.0: 2}": "the key 2.0 is read as float: quote it",
    "? [a, b]\n: 1": "a key is a list or a mapping",
    "? {a: b}\n: 1": "a key is a list or a mapping",
    "train: {a: 1, 'a': 2}": "duplicate key a",
    "train: {<<: {a: 1}, <<: {b: 1}}": "duplicate key <<",
    "train: {<<: 5}": "expected a mapping or list of mappings for merging",
    'run: {root: "a\\0b"}': "a string contains NUL",
    'train: {sample_prompts: ["a\\0b"]}': "a string contains NUL",
    'run: {root: "\\ud800"}': "an unpaired surrogate",
    "run: {root: a\x07b}": "unacceptable character",
    'run: {root: "a\\eb"}': "run.root=",
    "run: {root: %s}" % ("r" * 300): "a path has at most 4,095 bytes, and each file name at most 255",
    "run: {root: %s}" % ("r/" * 3000): "should have at most 4,095 characters",
    "run: {root: ~nobody-of-this-name/x}": "there is no user nobody-of-this-name",
    "run: {name: %s}" % ("n" * 201): "at most 200 characters",
    'plugins: ["a\\nb"]': "a path cannot contain control characters",
    'data: {path: [{path: "a\\tb"}]}': "data.path.0.path=",
    "run: {seed: 9223372036854775808}": "should be a whole number of at most 64 bits",
    "run: {seed: 1e300}": "should be a whole number of at most 64 bits",
    "cluster: {workers: [1, 1000000]}": "cluster.workers.1=1000000: should be less than or equal to 16384",
    "optim: {lr: 1e31}": "should be at most 1e+30",
    "optim: {lr: 1e999}": "should be a finite number",
    "optim: {lr: .inf}": "should be a finite number",
    "model: {num_layers: 1000000000}": "model.num_layers=1000000000: should be less than or equal to 10000",
    "model: {hidden_size: 1000000000000}": "model.hidden_size=1000000000000: should be less than or equal to",
    "model: {vocab_size: 100000000000}": "model.vocab_size=100000000000: should be less than or equal to",
    "model: {num_experts: 1000000000}": "model.num_experts=1000000000: should be less than or equal to",
    "train: {seq_len: 1000000000000}": "train.seq_len=1000000000000: should be less than or equal to",
    "parallel: {dp: 1000000000}": "parallel.dp=1000000000: should be less than or equal to",
    "parallel: {pp: 2000}": "parallel.pp=2000: should be less than or equal to 1024",
    "parallel: {dp: 1048576, tp: 2}": "parallel.dp * tp * pp * sp is 2,097,152 processes: at most 1,048,576",
    "base: [a]": "base=[\"a\"]: should be a preset's name or the path of a YAML file",
    "base: 5": "base=5: should be a preset's name",
    "base: ..": "no config '..': neither a file nor a preset",
    "base: %s" % ("b" * 5000): "neither a file nor a preset",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:50].replace("\x07", "BEL"))
def test_one_message_says_what_is_wrong(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml")
    assert WRONG[text] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("run: {name: a}\n".encode("utf-16"), "it is not UTF-8 text (byte 0 is 0xff)"),
        (b"run: {name: \xed\xa0\x80}\n", "it is not UTF-8 text"),
        (b"\0" * 100, "unacceptable character"),
        (b"%YAML 9.9\n---\na: 1\n", "found incompatible YAML document"),
        (b"a: 1\n---\na: 2\n", "but found another document"),
    ],
)
def test_bytes_that_are_no_yaml(tmp_path, content, told):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as YAML") as caught:
        load(tmp_path / "c.yaml")
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfrun: {name: mine}\n")
    assert load(tmp_path / "c.yaml").run.name == "mine"


def test_what_is_named_twice_can_be_changed_once():
    tree = parse_yaml("a: &a {k: 1}\nb: *a\nc: {<<: *a, k: 2}\n")
    tree["a"]["k"] = 3
    assert tree == {"a": {"k": 3}, "b": {"k": 1}, "c": {"k": 2}}


def test_merge_keys_and_dates_are_read(tmp_path):
    assert parse_yaml("r: &r {a: 1, b: 2}\ns: {<<: *r, b: 3}\n")["s"] == {"a": 1, "b": 3}
    (tmp_path / "c.yaml").write_text("run: {name: 2026-01-05}\n")
    assert load(tmp_path / "c.yaml").run.name == "2026-01-05"


def test_a_chain_of_bases_ends(tmp_path):
    (tmp_path / "0.yaml").write_text("base: quickstart\n")
    for i in range(1, 30):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i - 1}.yaml\n")
    assert load(tmp_path / "15.yaml") == load("quickstart")
    with pytest.raises(ConfigError, match=r"29\.yaml has a chain of over 20 `base` files"):
        load(tmp_path / "29.yaml")
    for i in range(1, 10):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i - 1}.yaml\n" + "\n" * (MAX_BYTES // 5))
    assert load(tmp_path / "4.yaml")
    with pytest.raises(
        ConfigError, match=rf"9\.yaml and its chain of 4 `base` files have over {MAX_BYTES:,} bytes in total"
    ):
        load(tmp_path / "9.yaml")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(ConfigError, match="leads back to this file"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "override",
    ["run.seed=0x" + "f" * 5000, "run.seed=" + "9" * 5000, "model=" + "[" * 500, "run.name=" + "a" * 5000,
     "plugins=&a [*a]", "a" * 5000, "a." * 5000 + "b=1", "run.name=\udcff", "run.root=" + "/x" * 5000,
     "train={1: 2}", "model.hidden_size=1e30", "model.hidden_size=!!int x", "run.seed=-" + "9" * 30],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_overrides_have_the_same_bounds(override):
    with pytest.raises(ConfigError) as caught:
        load("quickstart", [override])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


JSON = {
    "[" * 100_000: "nested too deep",
    '{"a": 1, "b": 2, "a": 3}': "duplicate key 'a'",
    '{"a": NaN}': "NaN is not a JSON number",
    '{"a": -Infinity}': "-Infinity is not a JSON number",
    '{"a": ' + "9" * 5000 + "}": "an integer has thousands of digits",
    '{"a": }': "Expecting value (line 1, column 7)",
}  # fmt: skip


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:20])
def test_json_that_is_none(text):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_json(text)
    assert JSON[text] in str(caught.value)


LARGEST = {
    "layers": ["model.num_layers=10000", "train.activation_checkpointing=selective"],
    "stages": ["model.num_layers=10000", "parallel.pp=1024", "train.global_batch=100000"],
    "processes": ["parallel.dp=1048576", "train.global_batch=1048576", "parallel.zero_stage=2"],
    "everything": [
        *(f"model.{key}=16777216" for key in ("hidden_size", "intermediate_size", "vocab_size")),
        "model.num_heads=4096", "model.head_dim=4096", "model.num_layers=10000", "model.num_experts=1024",
        "model.expert_size=65536",
        "model.top_k=1024", "train.seq_len=1073741824", "train.steps=9000000000000000000",
        "train.global_batch=9000000000000000000", "model.capacity_factor=1e30", "model.pad_to_capacity=true",
    ],
    "blocks": ["train.seq_len=1073741824", "model.block_sparse={block: 1, stride: 3, local_blocks: 7}"],
}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_that_is_allowed_is_planned_at_once(name):
    with ends():
        config, _ = resolve(load("quickstart", LARGEST[name]), vocab_size=4096)
        for device in (DEVICES["h100"], cpu()):
            json.dumps(predict(config, device).summary(), allow_nan=False)  # every number is one


def test_no_search_for_the_nearest_topology_lasts():
    """720,720 has 240 divisors."""
    for asked in ("parallel.tp=720720", "parallel.dp=720720"):
        with ends(), pytest.raises(ConfigError, match="change the sizes"):
            resolve(load("quickstart", [asked, "parallel.ep=7", "train.global_batch=720720"]), vocab_size=4096)


@pytest.mark.parametrize("command", ["config", "plan"])
def test_a_command_on_a_bomb_ends_in_one_message(tmp_path, command):
    (tmp_path / "c.yaml").write_text("base: quickstart\n" + BOMBS["in a value"])
    assert "counted as often as aliases repeat them" in message(muster(command, "c.yaml", cwd=tmp_path))


NUMBERS = {
    "plan quickstart --gpus 99999999999999999999": "--gpus 99999999999999999999: should be 1 to 1,048,576",
    "plan quickstart --gpus -1": "--gpus -1: should be 1 to",
    "plan quickstart --usd-per-gpu-hour nan": "should be a price, 0 to 1,000,000",
    "plan quickstart --usd-per-gpu-hour 1e308": "should be a price, 0 to 1,000,000",
    "plan quickstart --gpus 720720 --search train.global_batch=720720": "too many to compare: search with fewer",
    "sweep fit --table t.csv --bootstraps 1000000000": "--bootstraps 1000000000: should be 0 to 100,000",
    "sweep fit --table t.csv --bootstraps -1": "--bootstraps -1: should be 0 to 100,000",
    "sweep fit --table t.csv --max-budget nan": "--max-budget nan: should be above 0, at most 1e+30",
    "sweep predict --table t.csv --budget 1e300": "--budget 1e+300: should be above 0, at most 1e+30",
    "sweep predict --table t.csv --n -1 --d 1": "--n -1: should be above 0",
    f"config {'n' * 5000}": "neither a file nor a preset",
    f"status {'n' * 5000}": "no run 'nnn",
    f"status {'n' * 300} --root {'r' * 300}": "File name too long",
    f"sweep fit --table {'n' * 5000}": "no such file",
    f"data inspect {'n' * 5000}": "does not exist",
}


@pytest.mark.parametrize("command", NUMBERS, ids=lambda command: command[:40])
def test_what_is_typed_is_bounded_too(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["muster", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("muster: ")
    assert NUMBERS[command] in told
    assert len(told) < 600


TOO_LARGE = {
    "layers": ["model.num_layers=10000", "model.hidden_size=4096", "model.head_dim=128"],
    "vocabulary": ["model.vocab_size=16777216", "model.hidden_size=16777216", "model.head_dim=2"],
    "experts": ["model.num_experts=1048576", "model.expert_size=16384"],
    "length": ["train.seq_len=1073741824", "model.vocab_size=4096"],
    "batch": ["train.global_batch=1000000000", "train.micro_batch=1000000000"],
}


OTHERS = {
    "digits-convnet": ["model.hidden=[16777216, 16777216]"],
    "digits-diffusion": ["model.width=16777216"],
    "lstm": ["model.hidden_size=16777216"],
}


@pytest.mark.parametrize("preset", OTHERS)
def test_other_families_that_no_machine_holds_are_refused_before_anything_is_made(tmp_path, preset):
    with pytest.raises(ConfigError, match=r"^one process needs at least .*B for weights and gradients of .*: lower mo"):
        launch(load(preset, [*OTHERS[preset], f"run.root={tmp_path}"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TOO_LARGE)
def test_training_what_no_machine_holds_is_refused_before_anything_is_made(tmp_path, name):
    config = load("quickstart", [*TOO_LARGE[name], f"run.root={tmp_path}"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        launch(config)
    assert "one process needs" in str(caught.value)
    assert "lower model.* or train.micro_batch" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert list(tmp_path.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB


def test_training_needs_memory_of_its_device():
    config, _ = resolve(load("quickstart"), vocab_size=4096)
    here = torch.device("cpu")
    held = memory(config, cpu=True)
    refuse_too_large(config, here, there=int(held.needed))
    refuse_too_large(config, here)
    with pytest.raises(ConfigError, match="one process needs"):
        refuse_too_large(config, here, there=int(held.states) - 1)
    with pytest.raises(ConfigError, match="one process needs"):
        refuse_too_large(config, here, there=int(held.needed / 2) - 1)


@pytest.mark.parametrize("submitted", [math.nan, math.inf, -math.inf])
def test_a_time_of_submission_that_is_none(tmp_path, submitted):
    with pytest.raises(ConfigError, match="should be Unix seconds"):
        prepare_run(load("quickstart", [f"run.root={tmp_path}"]), submitted=submitted)
    assert list(tmp_path.iterdir()) == []

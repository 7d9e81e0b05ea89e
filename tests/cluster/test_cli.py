"""The `muster` command: help, configs, and mistakes that end in one message and exit code 2."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from configs import from_dict, load, preset_names
from trainer.data.tokenizer.tokenizer import byte_tokenizer
from trainer.record.lines import Record

ROOT = Path(__file__).parents[2]


def test_help_and_config_import_nothing_heavy():
    script = (
        "import sys; from cluster import cli; sys.argv = ['muster', 'config', 'quickstart']\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


MISTAKES = [
    "generate nosuch --prompt x", "generate empty --prompt x", "eval nosuch", "eval empty --step 3",
    "export nosuch --out x",
    "checkpoint list nosuch",
    "checkpoint show empty", "checkpoint verify empty", "data inspect nosuch",
    "data show nosuch --step 1", "train quickstart optim.warmup=11 train.steps=10",
    "train quickstart data.path=nosuch", "train quickstart train.init_from=nosuch", "train quickstart parallel.ep=3",
]  # fmt: skip


def test_mistakes_that_need_no_torch_wait_for_none(tmp_path):
    """All in one process: an import by one of them would show in the next."""
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "runs" / "empty" / "config.yaml").write_text("run: {name: empty}")
    script = (
        "import sys; from cluster import cli\n"
        f"for command in {MISTAKES}:\n"
        "    sys.argv = ['muster', *command.split()]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert end.code == 2, command\n"
        "    heavy = {'torch', 'ray', 'mlflow', 'deepspeed'} & set(sys.modules); assert not heavy, (command, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) <= 2 * len(MISTAKES)
    assert done.stderr.count("muster: ") == len(MISTAKES)


def test_training_imports_no_compiler():
    """Importing torch's compiler takes a second, and most runs on CPUs compile nothing."""
    script = "import sys, trainer.loop; assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_names_every_command(muster):
    code, out, _ = muster("--help")
    assert code == 0
    for command in (
        "train",
        "config",
        "generate",
        "eval",
        "export",
        "data",
        "presets",
        "runs",
        "sync",
        "doctor",
        "submit",
        "jobs",
        "logs",
        "stop",
        "retry",
        "status",
        "cluster",
    ):
        assert f"  {command} " in out
        assert muster(command, "--help")[0] == 0
    for command in ("prepare", "inspect", "show"):
        assert muster("data", command, "--help")[0] == 0


def test_presets_say_what_they_train(muster):
    code, out, _ = muster("presets")
    assert code == 0
    assert re.search(
        r"^wine: mlp, classification(, [\d.]+ minutes on two CPU cores)?\n  A multilayer perceptron identifies",
        out,
        re.M,
    )
    listed = json.loads(muster("presets", "--json")[1])
    assert [each["name"] for each in listed] == preset_names()
    for each in listed:
        assert all(value in out for value in each.values() if isinstance(value, str))
        assert each["held_out"] == "not measured" or re.fullmatch(
            r"[A-Za-z0-9 -]+ \d\.\d+( nats per token)?", each["held_out"]
        )
        assert "held out" not in each["trains"]


@pytest.mark.parametrize("preset", preset_names())
def test_config_of_every_preset_reads_back_as_itself(muster, tmp_path, preset):
    code, out, _ = muster("config", preset, "run.name=other")
    assert code == 0
    (tmp_path / "resolved.yaml").write_text(out)
    code, again, _ = muster("config", str(tmp_path / "resolved.yaml"), "--json")
    assert code == 0
    assert from_dict(json.loads(again)) == from_dict(yaml.safe_load(out))
    assert json.loads(again)["run"]["name"] == "other"


def test_config_plans_the_vocabulary(muster, tmp_path):
    _, out, _ = muster("config", "quickstart", "data.prepare.tokenizer=bytes", "--json")
    assert json.loads(out)["model"]["vocab_size"] == 320
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    _, out, _ = muster("config", "quickstart", f"data.prepare.tokenizer={tmp_path}", "--json")
    assert json.loads(out)["model"]["vocab_size"] == 320
    code, _, err = muster("config", "quickstart", f"data.prepare.tokenizer={tmp_path}/none.json")
    assert (code, "an existing tokenizer.json" in err) == (2, True)


def test_schema_describes_every_section(muster):
    code, out, _ = muster("config", "--schema")
    schema = json.loads(out)
    assert code == 0
    assert set(schema["properties"]) == set(load("quickstart").model_dump())
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config"], ["CONFIG", "quickstart"]),
        (["config", "quickstrat"], ["quickstrat", "did you mean quickstart"]),
        (["config", "quickstart", "train.stps=3"], ["train.stps", "did you mean train.steps"]),
        (["config", "quickstart", "train.steps=many"], ["train.steps", "many"]),
        (["config", "quickstart", "train.steps"], ["key=value"]),
        (["config", "quickstart", "train.steps=[1"], ["train.steps", "YAML"]),
        (["config", "quickstart", "parallel.tp=3"], ["parallel.tp=3", "num_heads", "Nearest that works"]),
        (["train", "quickstart", "optim.lr=0"], ["optim.lr"]),
        (["train", "quickstart", "parallel.dp=9000", "train.global_batch=9000"], ["9,000 processes", "parallel.dp"]),
        (["train", "quickstart", "cluster.cpus_per_worker=5000"], ["cluster.cpus_per_worker=5000"]),
        (["train", "quickstart", "data.path=nowhere"], ["data.path=", "nowhere", "muster data prepare"]),
        (["train", "quickstart", "run.name=../up"], ["run.name", "../up"]),
        (["generate", "missing", "--prompt", "a"], ["missing", "--root"]),
        (["eval", "missing"], ["missing", "--root"]),
        (["export", "missing", "--out", "x"], ["missing", "--root"]),
        (["export", "missing"], ["--out"]),
        (["export", "missing", "--out", "x", "--to", "gguf"], ["--to gguf", "hf"]),
        (["export", "missing", "--out", "x", "--dtype", "int8"], ["--dtype int8", "bfloat16"]),
        (["export", "missing", "--out", "x", "--max-shard-size", "big"], ["--max-shard-size big", "2GiB"]),
        (["export", "missing", "--out", "x", "--max-shard-size", "0"], ["--max-shard-size 0"]),
        (["runs", "rm", "missing", "--yes"], ["missing", "--root"]),
        (["runs", "note", "missing", "x"], ["missing", "--root"]),
        (["runs", "tag", "missing", "a=b"], ["missing", "--root"]),
        (["sync", "missing"], ["missing", "--root"]),
        (["submit", "quickstart"], ["run.root=runs", "every machine"]),
        (["submit", "quickstart", "run.root=/tmp/r", "--address", "http://127.0.0.1:1"], ["127.0.0.1:1", "no token"]),
        (["jobs", "--address", "nowhere"], ["nowhere", "--address"]),
        (["cluster", "join", "127.0.0.1:1"], ["no token", "RAY_AUTH_TOKEN_PATH"]),
        (["data", "show", "missing", "--step", "1"], ["missing", "--root"]),
        (["data", "inspect", "nowhere"], ["nowhere"]),
        (["data", "prepare", "nowhere", "--out", "x"], ["nowhere"]),
        (["data", "prepare", ".", "--out", "x", "--vocab-size", "3"], ["vocab_size", "3"]),
        (["data", "prepare", ".", "--out", "x", "--held-out", "2"], ["held_out", "2"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(muster, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = muster(*arguments)
    assert code == 2
    assert err.startswith("muster: ")
    assert len(err.splitlines()) <= 4
    for word in words:
        assert word in err


@pytest.mark.parametrize("arguments", [["bogus"], ["train"], ["data", "show", "x"], ["eval", "x", "--bogus"]])
def test_a_misuse_of_the_command_line_is_exit_code_2(muster, arguments):
    code, _, err = muster(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_runs_lists_what_is_there(muster, tmp_path):
    for name, loss in (("first", 2.5), ("second", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("run: {}")
        record = Record(tmp_path / name, 1)
        record.event("attempt_started")
        record.metrics({"step": 7, "loss": loss, "tokens": 1234})
    record.event("attempt_ended", status="STOPPED", reason="signal", step=7)
    code, out, _ = muster("runs", "--root", str(tmp_path))
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["first", "RUNNING", "7"],
        ["second", "STOPPED", "7"],
    ]
    _, out, _ = muster("runs", "--root", str(tmp_path), "--json")
    assert [(run["name"], run["loss"]) for run in json.loads(out)] == [("first", 2.5), ("second", None)]


@pytest.mark.parametrize(
    "arguments", [["--version"], ["-h"], ["runs", "-h"], ["runs", "rm", "-h"], ["sweep", "fit", "-h"]]
)
def test_version_and_short_help(muster, arguments):
    code, out, err = muster(*arguments)
    assert (code, err) == (0, "")
    assert out == f"muster {version('muster-train')}\n" if arguments == ["--version"] else out.startswith("Usage: ")


def test_the_shell_completes_commands_and_runs(tmp_path):
    for name in ("aa-one", "aa-two", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    for words, found in (("muster che", {"checkpoint"}), ("muster status aa", {"aa-one", "aa-two"})):
        environment = os.environ | {"_MUSTER_COMPLETE": "complete_bash", "COMP_WORDS": words, "PYTHONPATH": str(ROOT)}
        environment["COMP_CWORD"] = str(words.count(" "))
        command = [
            sys.executable,
            "-P",
            "-c",
            "import sys; sys.argv[0] = 'muster'; from cluster.cli import main; main()",
        ]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert set(done.stdout.split()) == found, done.stderr


def test_doctor_tells_what_is_here(muster, tmp_path, monkeypatch):
    locks = tmp_path / "extensions" / "py311" / "op"
    locks.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out, _ = muster("doctor", "--root", str(tmp_path), "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0
    assert {"python", "torch", "deepspeed", "ray", "mlflow", "gpus", "compiler", "/dev/shm"} <= set(findings)
    (locks / "lock").touch()
    code, out, _ = muster("doctor", "--root", str(tmp_path), "--address", "127.0.0.1:1")
    assert code == 1
    assert str(locks / "lock") in out
    assert "127.0.0.1:1 does not answer" in out


def test_config_tells_what_the_model_costs(muster):
    code, out, _ = muster("config", "moe-8x7b")
    assert code == 0
    assert "46,702,792,704 parameters, 12,879,925,248 active" in out

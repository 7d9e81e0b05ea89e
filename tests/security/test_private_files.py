"""What is written under umask 0 is its owner's alone: data, runs, a sweep, exports, the queue, the tracker's."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from second_user import as_second_user, let_in, needs_second_user

from configs import ConfigError, private_folder

pytestmark = pytest.mark.ray
CONFIG = """
run: {name: one}
model: {num_layers: 2, hidden_size: 32, num_heads: 2, num_experts: 2, expert_size: 32}
train: {steps: 6, global_batch: 4, seq_len: 32, precision: fp32, eval_sequences: 4, eval_every: 3, sample_tokens: 4}
optim: {lr: 1.0e-3}
data: {path: data/tokens}
checkpoint: {every: 3}
"""
PROFILED = ("train.profile.steps=1", "train.profile.start=2")
SWEEP = """
name: swept
base: one.yaml
grid: {}
axes: {optim.lr: [1.0e-3]}
"""
READABLE = """
import os, sys
for folder, folders, files in os.walk(sys.argv[1]):
    for name in files:
        try:
            open(os.path.join(folder, name), "rb").close()
            print(os.path.join(folder, name))
        except OSError:
            pass
"""


def child(folder: Path, *command: str) -> str:
    """Run a module of ours under umask 0, with a home of its own. Returns what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "TORCHINDUCTOR", "TRITON"))}
    home = folder / "home"
    environment = kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": "/tmp"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command], cwd=folder, env=environment, text=True, capture_output=True,
        timeout=300, preexec_fn=lambda: os.umask(0),
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder that others may enter, and in it what the commands of ours have written."""
    folder = let_in(tmp_path_factory.mktemp("private"))
    for name in ("home", "home/.cache", "texts", "runs", "data"):
        (folder / name).mkdir(mode=0o755)
    for number in range(24):
        lines = [f"def f{number}_{i}(x):\n    return x * {i * number % 97} + {i}\n" for i in range(24)]
        (folder / "texts" / f"{number}.py").write_text("".join(lines))
    (folder / "one.yaml").write_text(CONFIG)
    (folder / "sweep.yaml").write_text(SWEEP)
    tokenizer = ("--tokenizer", "bytes", "--held-out", "0.2", "--workers", "2")
    child(folder, "cluster.cli", "data", "prepare", "texts", "--out", "data/tokens", *tokenizer)
    child(folder, "trainer", "one.yaml", *PROFILED)
    child(folder, "cluster.cli", "export", "one", "--to", "hf")
    child(folder, "cluster.cli", "sweep", "run", "sweep.yaml")
    return folder


GIVEN = ("texts", "one.yaml", "sweep.yaml")


def found(written: Path) -> list[Path]:
    ours = [path for path in written.rglob("*") if path.relative_to(written).parts[0] not in GIVEN]
    return [
        path
        for path in ours
        if path not in (written / "home", written / "home/.cache", written / "runs", written / "data")
    ]


@pytest.mark.slow
def test_everything_is_its_owners_alone(written):
    paths = found(written)
    there = {str(path.relative_to(written)) for path in paths}
    for expected in (
        "data/tokens/manifest.json", "runs/mlflow.db", "runs/mlartifacts", "hf/model.safetensors",
        "runs/swept/sweep.yaml", "runs/one/config.yaml", "runs/one/tracking.log", "runs/one/events.jsonl",
        "runs/one/logs/attempt-01-rank-0000.log", "runs/one/checkpoints/step-00000006/manifest.json", "runs/one/lock",
        "runs/one/samples", "runs/one/plots/loss.png", "runs/one/profiles", "runs/one/model/config.json",
    ):  # fmt: skip
        assert expected in there
    assert list((written / "runs" / "swept" / "trials").glob("*/metrics.jsonl"))
    wide = [path for path in paths if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink()]
    assert wide == []


@pytest.mark.slow
@needs_second_user
def test_another_user_reads_nothing(written):
    seen = as_second_user(READABLE, let_in(written)).stdout.split()
    assert {Path(path).relative_to(written).parts[0] for path in seen} == set(GIVEN)


def test_a_folder_of_secrets_that_was_open_is_shut(tmp_path):
    (tmp_path / "queue").mkdir(mode=0o755)
    (tmp_path / "queue").chmod(0o777)
    assert stat.S_IMODE(private_folder(tmp_path / "queue", "MUSTER_QUEUE").stat().st_mode) == 0o700
    assert stat.S_IMODE(private_folder(tmp_path / "new", "MUSTER_QUEUE").stat().st_mode) == 0o700


@needs_second_user
def test_a_folder_of_secrets_is_not_another_users(tmp_path):
    code = "import pathlib, sys, configs; configs.private_folder(pathlib.Path(sys.argv[1]), 'MUSTER_QUEUE')"
    let_in(tmp_path).chmod(0o755)
    (tmp_path / "queue").mkdir(mode=0o755)
    assert "ConfigError" in as_second_user(code, tmp_path / "queue", imports=["configs", "pathlib"]).stderr
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"made private to this user .*set MUSTER_QUEUE to another"):
        private_folder(tmp_path / "file" / "queue", "MUSTER_QUEUE")

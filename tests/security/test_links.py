"""What a run or a sweep writes stays in its folder: links in it, and folders of others, are refused before."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from second_user import NOBODY, needs_second_user
from support import tiny

from configs import ConfigError, to_yaml
from trainer.files import own_files
from trainer.files.durable import write_durably
from trainer.files.own_files import require_own
from trainer.record.lines import Record
from trainer.run.folder import hold, prepare_run
from trainer.run.stop import request_stop
from trainer.tracking.artifacts import Artifacts
from trainer.tracking.mlflow import MlflowTracker, _schema_lock
from trainer.tracking.shipper import only_one
from trainer.tracking.start import start_shipper, write_state
from trainer.tracking.tracker import RunInfo

WORDS = "what the owner wrote\n"
FILES = [
    "config.yaml", ".config.yaml.new", "metrics.jsonl", "events.jsonl", "lock", "stop", "tracking.log",
    "tracking.json", ".tracking.json.new", "tracking.lock", "logs/attempt-01-rank-0000.log",
    "stacks/attempt-01-rank-0000.txt",
    "samples/step-00000004.txt", "checkpoints/step-00000004/rank-00000.safetensors", "plots/loss.png", "unknown",
]  # fmt: skip
FOLDERS = ["logs", "stacks", "samples", "checkpoints", "checkpoints/step-00000004", "plots", "profiles", "model"]


@pytest.fixture
def victim(tmp_path):
    """A folder of the owner's, outside of the run, with a file that is to stay as it is."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "profile").write_text(WORDS)
    return folder


@pytest.fixture
def asked(tmp_path, tiny_data):
    return tiny(
        run={"name": "run", "root": str(tmp_path / "runs")},
        data={"path": str(tiny_data)},
        train={"steps": 2},
        tracking={"enabled": True, "uri": "sqlite:////nowhere/$(touch x).db"},
    )


def link(run_dir: Path, name: str, to: Path) -> Path:
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def untouched(victim: Path) -> bool:
    return below(victim) == {victim / "profile"} and (victim / "profile").read_text() == WORDS


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_run_with_a_link_is_refused(asked, tmp_path, victim, muster, name):
    run_dir = tmp_path / "runs" / "run"
    path = link(run_dir, name, victim if name in FOLDERS else victim / "profile")
    (tmp_path / "c.yaml").write_text(to_yaml(asked))
    before = below(run_dir)
    code, _, err = muster("train", str(tmp_path / "c.yaml"))
    assert (code, err.splitlines()[0]) == (
        2,
        f"muster: {path} is a link to {os.readlink(path)}: nothing is written to a folder that may lead elsewhere.",
    )
    assert below(run_dir) == before
    assert untouched(victim)


def test_links_that_lead_nowhere_or_stay_inside_are_refused_too(asked, tmp_path):
    run_dir = tmp_path / "runs" / "run"
    for target in ("missing", ".", str(run_dir), "link"):
        path = link(run_dir, "link", Path(target))
        with pytest.raises(ConfigError, match="link is a link to "):
            prepare_run(asked)
        path.unlink()


def test_a_run_that_is_a_link_is_refused(asked, tmp_path, victim):
    link(tmp_path, "runs/run", victim)
    with pytest.raises(ConfigError, match="run is a link to "):
        prepare_run(asked)
    assert untouched(victim)


def test_a_fork_into_a_link_is_refused(asked, tmp_path, victim):
    from trainer.checkpoint import manifest

    run_dir = prepare_run(asked)
    (manifest.folder(run_dir, 2)).mkdir(parents=True)
    (manifest.folder(run_dir, 2) / manifest.MANIFEST).write_text("{}")
    link(tmp_path, "runs/other/lock", victim / "profile")
    with pytest.raises(ConfigError, match="lock is a link to "):
        prepare_run(asked, fork="other")
    assert untouched(victim)


def test_a_pipe_and_a_device_are_refused(asked, tmp_path):
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    os.mkfifo(run_dir / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is neither a file nor a folder: nothing is written"):
        prepare_run(asked)


def test_the_root_may_be_a_link_of_the_owners(asked, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert prepare_run(asked) == tmp_path / "disk" / "run"
    assert prepare_run(asked) == tmp_path / "disk" / "run", "nothing of what it makes is refused the next time"


@needs_second_user
@pytest.mark.parametrize("name", [".", "metrics.jsonl", "logs", "logs/attempt-01-rank-0000.log"])
def test_another_owner(asked, tmp_path, muster, name):
    run_dir = tmp_path / "runs" / "run"
    (run_dir / "logs").mkdir(parents=True)
    for file in ("metrics.jsonl", "logs/attempt-01-rank-0000.log"):
        (run_dir / file).touch()
    os.chown(run_dir / name, NOBODY, NOBODY)
    (tmp_path / "c.yaml").write_text(to_yaml(asked))
    before = below(run_dir)
    code, _, err = muster("train", str(tmp_path / "c.yaml"))
    assert code == 2
    assert f"{run_dir / name} belongs to user {NOBODY}, not to you (0)" in err
    assert below(run_dir) == before


def test_a_file_system_that_knows_us_by_another_number(asked, monkeypatch):
    run_dir = prepare_run(asked)
    monkeypatch.setattr(own_files.os, "geteuid", lambda: 4321)
    require_own(run_dir)


def test_sync_of_a_run_with_a_link_is_refused(asked, victim, muster):
    run_dir = prepare_run(asked)
    link(run_dir, "samples/secret", victim / "profile")
    code, out, err = muster("sync", str(run_dir))
    assert (code, out) == (2, "")
    assert "secret is a link to " in err
    assert not (run_dir / "tracking.json").exists()


def test_no_file_behind_a_link_is_sent(tmp_path, victim):
    """As one that came after the look at the folder."""
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "own").write_text("own")
    link(tmp_path / "run", "samples/other", victim / "profile")
    link(tmp_path / "run", "config.yaml", victim / "profile")
    sent: list[str] = []

    class Tracker:
        def artifact(self, path: Path, folder: str) -> None:
            sent.append(path.name)

    Artifacts(tmp_path / "run", Tracker(), (), lambda: None).send(("config.yaml", "samples"))
    assert sent == ["own"]


def start_sending(run_dir: Path) -> None:
    start_shipper(run_dir, tiny())


def enter(context):
    def write(run_dir: Path) -> None:
        with context(run_dir):
            pass

    return write


WRITERS = {
    "metrics.jsonl": lambda run_dir: Record(run_dir, 1),
    "events.jsonl": lambda run_dir: Record(run_dir, 1),
    ".stop.new": request_stop,
    "lock": enter(lambda run_dir: hold(run_dir / "lock", "busy {}")),
    "tracking.log": start_sending,
    ".tracking.json.new": lambda run_dir: write_state(run_dir, {}),
    "tracking.lock": enter(lambda run_dir: only_one(run_dir, 0.0)),
    "mlflow.db.lock": enter(lambda run_dir: _schema_lock(f"sqlite:///{run_dir / 'mlflow.db'}")),
    ".manifest.json.new": lambda run_dir: write_durably(run_dir / "manifest.json", {}),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS)
def test_nothing_is_written_through_a_link_that_came_later(tmp_path, victim, name, write):
    (tmp_path / "run").mkdir()
    link(tmp_path / "run", name, victim / "profile")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "run")
    assert untouched(victim)


def test_output_is_not_kept_through_a_link(tmp_path, victim):
    (tmp_path / "run").mkdir()
    link(tmp_path / "run", "logs/attempt-01-rank-0000.log", victim / "profile")
    code = "import sys; from pathlib import Path; from trainer.processes.output import output_kept\n"
    code += "with output_kept(Path(sys.argv[1])): print('words')"
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Too many levels of symbolic links" in done.stderr
    assert untouched(victim)


def test_a_database_of_a_config_empties_no_file(tmp_path):
    (tmp_path / "poetry.lock").write_text(WORDS)
    with _schema_lock(f"sqlite:///{tmp_path / 'poetry'}"):
        pass
    assert (tmp_path / "poetry.lock").read_text() == WORDS


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """A tracker of somebody else's, which comes beside a run."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('theirs') / 'mlflow.db'}"
    MlflowTracker(uri, "muster").open(RunInfo("theirs", "a", None, 0.0))
    return uri


@pytest.mark.parametrize("place", ["", "{id}", "{id}/../artifacts", "link/{id}/artifacts", "{id}/artifacts"])
def test_a_database_says_where_files_go_but_not_over_others(tmp_path, victim, database, place):
    """By its runs' artifact_uri, as MLflow's client believes it."""
    tracker = MlflowTracker(database, "muster", tmp_path / "artifacts")
    run_id = tracker.open(RunInfo("one", place, None, 0.0)).run_id
    (victim / "link").mkdir()
    (victim / "link" / run_id).symlink_to(victim)
    (victim / "artifacts").mkdir()
    (victim / run_id).mkdir()
    (victim / run_id / "artifacts").symlink_to(victim)
    with contextlib.closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as opened:
        theirs = victim.as_uri() + "/" + place.format(id=run_id)
        opened.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (theirs, run_id))
        opened.commit()
    (tmp_path / "profile").write_text("a stranger's")
    before = below(victim)
    with pytest.raises(ConfigError, match="not a folder that MLflow creates for a run"):
        tracker.artifact(tmp_path / "profile", "")
    assert below(victim) == before
    assert (victim / "profile").read_text() == WORDS


SWEEP = """
name: sweep
root: {root}
base: quickstart
set: {{data.path: {data}}}
random: {{n: 1}}
axes: {{optim.lr: [1.0e-3]}}
"""


@pytest.mark.parametrize("name", ["lock", "plan.json", ".plan.json.new", "trials", "plots", "events.jsonl"])
def test_a_sweep_with_a_link_is_refused(tmp_path, tiny_data, victim, muster, name):
    (tmp_path / "s.yaml").write_text(SWEEP.format(root=tmp_path / "runs", data=tiny_data))
    link(tmp_path / "runs" / "sweep", name, victim)
    code, _, err = muster("sweep", "run", str(tmp_path / "s.yaml"))
    assert code == 2
    assert f"{name} is a link to {victim}: " in err
    assert untouched(victim)
    assert len(below(tmp_path / "runs" / "sweep")) == 1

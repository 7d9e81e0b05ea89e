"""A password in a tracker's URI stands in no file of a run or sweep, in nothing that is printed, in no command."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from no_hang import ends
from support import tiny

from cluster.gangs.share import Node
from cluster.server.messages import Submit
from cluster.server.pack import MESSAGE, read_message
from cluster.server.submit import CONFIG, SWEEP, submit
from cluster.sweep.train.submit import submit_sweep
from configs import ConfigError, flatten, from_dict, load, mask, to_yaml
from configs.load import dump_yaml
from configs.sweep.definition import load_sweep
from trainer.record.lines import Record, read_events
from trainer.run.folder import prepare_run, read_config
from trainer.tracking import NoCredentials, read_state, tracking_uri
from trainer.tracking.shipper import ship

ROOT = Path(__file__).parents[2]
PASSWORD = "Tr0ub4dor-3"
URI = f"http://shipper:{PASSWORD}@127.0.0.1:1/path?access_token={PASSWORD}"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql+psycopg2://u:SECRET@h:5432/db", "postgresql+psycopg2://u:***@h:5432/db"),
        ("postgresql://me@corp:SECRET@h/db", "postgresql://me@corp:***@h/db"),
        ("postgresql://h/db?user=u&password=SECRET&sslmode=require", "postgresql://h/db?user=u&password=***&sslmode=require"),
        ("postgresql://h/db?sslpassword=SECRET", "postgresql://h/db?sslpassword=***"),
        ("postgresql://h/db?pass%77ord=SECRET", "postgresql://h/db?pass%77ord=***"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3DSECRET", "mssql+pyodbc:///?odbc_connect=***"),
        ("https://SECRET@h/x", "https://***@h/x"),
        ("HTTP://U:SECRET@h", "HTTP://U:***@h"),
        ("http://:SECRET@[::1]:80", "http://:***@[::1]:80"),
        ("https://h/x?sig=SECRET#access_token=SECRET", "https://h/x?sig=***#access_token=***"),
        ("s3://key:SECRET@bucket/x", "s3://key:***@bucket/x"),
        ("http://h:5000/?next=https://u:SECRET@x", "http://h:5000/?next=https://u:***@x"),
        ("a" * 99 + "://u:SECRET@h", "a" * 99 + "://u:***@h"),
        ("1http://u:SECRET@h +http://SECRET@h", "1http://u:***@h +http://***@h"),
        ("at http://u:SECRET@h, then 'mysql://u:SECRET@h'", "at http://u:***@h, then 'mysql://u:***@h'"),
        *((plain, plain) for plain in (
            "sqlite:////tmp/me@home/mlflow.db", "http://127.0.0.1:5000", "http://h:5000/#/runs?mail=a@b", "data/a:b@c",
            "postgresql://mlflow@postgres:5432/mlflow", "https://h/x?page=2&sslmode=require", "10.0.0.1:6379",
        )),
    ],
)  # fmt: skip
def test_what_is_masked_and_what_is_not(uri, shown):
    assert mask(uri) == shown


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    scheme=st.sampled_from(["http", "https", "postgresql+psycopg2", "mysql", "s3"]),
    user=st.text("abc.-_%@", max_size=6),
    inside=st.text("ab1/:?#@&=;'\" %+é", max_size=8),
)
def test_no_password_gets_through(scheme, user, inside):
    assert "S3cr3t" not in mask(f"{scheme}://{user}:S3cr3t{inside}@host:5432/db")
    once = mask(f"{scheme}://{user}:S3cr3t{inside}@host:5432/db?token=S3cr3t")
    assert mask(once) == once


@pytest.mark.parametrize("begin", ["", "http://", " http://", "http://u:p@h?"])
@pytest.mark.parametrize(
    "unit",
    [
        "a", "a.", "a://", "a://b:c", "a://b:c@", "://", "a:", "@", "http://a@", "http://a:1/", "http://u:1/@ ", "?a",
        "?a=", "&password=", "pass", "%41", "é", "a+", "'", " a://b", "\n", "a://\n", "a://[",
    ],
)  # fmt: skip
def test_masking_takes_linear_time(begin, unit):
    text = begin + unit * (300_000 // len(unit)) + ":1"
    with ends():
        mask(text)


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]


@pytest.fixture
def run_dir(tmp_path, tiny_data, monkeypatch) -> Path:
    """A run that has not begun, with a tracker that does not answer and is soon given up."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be restored")
    (tmp_path / "soon.py").write_text("import trainer.tracking.start\ntrainer.tracking.start.GRACE = 1.0\n")
    tree = tiny(run={"name": "one", "root": str(tmp_path / "runs")}, data={"path": str(tiny_data)}).model_dump(
        mode="json"
    )
    tree |= {"tracking": {"uri": URI, "export_model": False}, "plugins": [str(tmp_path / "soon.py")]}
    (tmp_path / "run.yaml").write_text(dump_yaml(tree))
    return prepare_run(load(tmp_path / "run.yaml"))


def train(config: Path) -> str:
    """As a process of its own. Returns all that it printed."""
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_TRACKING")}
    whole = [sys.executable, "-P", "-m", "trainer", str(config)]
    done = subprocess.run(
        whole, cwd=config.parent, env=alone | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_runs_files_have_no_password_and_its_shipper_has(run_dir, tmp_path):
    assert PASSWORD not in train(tmp_path / "run.yaml")
    assert read_state(run_dir)["uri"] == mask(URI)
    assert f"not sent to {mask(URI)}" in read_state(run_dir)["error"]
    assert tracking_uri(run_dir, read_config(run_dir)) == URI  # handed down to what `prepare_run` was called in
    done = ship(run_dir, grace=0.0)
    assert mask(URI) in done.missing
    assert PASSWORD not in done.missing
    record = Record(run_dir, 1)
    record.event("failure", reason=f"cannot reach {URI}", traceback=f"at {URI}")
    record.event("config_changed", changed={"uris": [URI]})
    record.close()
    assert mask(URI) in (run_dir / "config.yaml").read_text()
    assert (run_dir / "tracking.log").stat().st_size
    assert written(run_dir.parent) == []
    assert flatten(read_config(run_dir))["tracking.uri"] == mask(URI)


@pytest.mark.slow
def test_a_run_whose_password_is_not_here_trains_and_says_so(run_dir, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(NoCredentials, match="MLFLOW_TRACKING_URI to the whole URI"):
        tracking_uri(run_dir, read_config(run_dir))
    said = train(run_dir / "config.yaml")
    assert said.count("muster: tracking.uri=") == 1
    assert [event["status"] for event in read_events(run_dir) if event["event"] == "attempt_ended"] == ["FINISHED"]
    assert "the whole URI" in read_state(run_dir)["error"]
    with pytest.raises(ConfigError, match="the whole URI"):
        ship(run_dir)


def test_the_password_comes_from_where_mlflow_looks_for_it(run_dir, monkeypatch):
    config = read_config(run_dir)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://shipper:other@elsewhere")
    with pytest.raises(NoCredentials):
        tracking_uri(run_dir, config)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://u:***@h:5000/x"})})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:right@h:5000/x")
    assert tracking_uri(run_dir, config) == "http://u:right@h:5000/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    assert tracking_uri(run_dir, config) == "http://h:5000/x"


@pytest.mark.parametrize(
    "own", [None, "http://mine:5000", "https://h:5000", "http://h", "http://h:5000@mine", "sqlite:///h"]
)
@pytest.mark.parametrize("kept", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH", "file"])
def test_credentials_go_to_no_server_that_only_a_file_names(monkeypatch, tmp_path, own, kept):
    """MLflow shows them to any server, by whoever it was named."""

    def uri_of(uri: str) -> str:
        return tracking_uri(tmp_path, tiny(tracking={"uri": uri}))

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert uri_of("http://u@h:5000/x") == "http://u@h:5000/x"
    if kept == "file":
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_password = S3cr3t\n")
    else:
        monkeypatch.setenv(kept, "S3cr3t")
    if own:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    for theirs in ("http://u@h:5000/x", "HTTP://h:5000", "http://h:port", "http://[h:5000", "http://h:999999"):
        with pytest.raises(NoCredentials, match="comes from a file"):
            uri_of(theirs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://h:5000")
    assert uri_of("http://u@h:5000/x") == "http://u@h:5000/x"
    assert uri_of("sqlite:///a.db") == "sqlite:///a.db"


def test_what_tracking_json_had_before_is_masked(tmp_path):
    (tmp_path / "tracking.json").write_text(json.dumps({"uri": URI, "run_id": "a", "offset": 3}))
    assert read_state(tmp_path) == {"uri": mask(URI), "run_id": "a", "offset": 3}


def test_no_view_of_a_config_or_a_sweep_has_it(tmp_path):
    config = load("quickstart", [f"tracking.uri={URI}", f"cluster.address=http://u:{PASSWORD}@h:8265"])
    assert config.tracking.uri == URI
    (tmp_path / "s.yaml").write_text("{grid: {}, axes: {optim.lr: [1.0e-3]}}")
    sweep = load_sweep(tmp_path / "s.yaml", [f"set.tracking.uri={URI}"])
    for text in (
        to_yaml(config),
        config.model_dump_json(),
        str(flatten(config)),
        repr(config),
        to_yaml(sweep),
        repr(sweep),
    ):
        assert PASSWORD not in text
    assert from_dict(config.model_dump()).tracking.uri == URI


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "quickstart", f"tracking.uri={URI}"],
        ["config", "quickstart", f"tracking.uri={URI}", "--json"],
        ["train", "quickstart", f"tracking.uri=file://u:{PASSWORD}@h/x", "run.root=/dev/null/x"],
        ["config", "quickstart", f"data.pth=s3://k:{PASSWORD}@b"],
        ["jobs", "--address", f"http://u:{PASSWORD}@127.0.0.1:1"],
        ["doctor"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_nothing_printed_has_it(muster, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    _, out, err = muster(*arguments)
    assert out + err
    assert PASSWORD not in out + err


@pytest.mark.slow
def test_no_command_line_shows_it_for_long(tmp_path):
    whole = [sys.executable, "-P", "-m", "cluster.cli", "doctor", "--address", f"http://u:{PASSWORD}@127.0.0.1:1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(whole, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        seen = []
        while process.poll() is None:
            try:
                line = " ".join(psutil.Process(process.pid).cmdline())
            except psutil.Error:
                break
            seen += [line] if line and line not in seen[-1:] else []
            time.sleep(0.02)
        out = process.stdout.read()
    assert mask(whole[-1]) in seen[-1]
    assert PASSWORD not in seen[-1]
    assert PASSWORD not in out
    assert "127.0.0.1:1" in out


class Sent:
    """A cluster of one machine that takes one job."""

    def __init__(self, *_) -> None:
        self.packages: list[bytes] = []

    def nodes(self) -> list[Node]:
        return [Node(8.0, 0.0)]

    def jobs(self) -> dict:
        return {}

    def submit(self, path: Path) -> None:
        self.packages.append(path.read_bytes())

    def job(self) -> tuple[Submit, dict[str, str]]:
        """What the queue reads, and the files of the job, by their names."""
        [content] = self.packages
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert all(each.external_attr >> 16 & 0o077 == 0 for each in archive.infolist() if each.filename != MESSAGE)
            files = {name: archive.read(name).decode() for name in archive.namelist() if name.startswith("work/")}
        return read_message(content), files


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """A user's folder, and what is sent from there."""
    found = Sent()
    for module in ("cluster.server.submit", "cluster.sweep.train.submit"):
        monkeypatch.setattr(f"{module}.Cluster", lambda address: found)
        monkeypatch.setattr(f"{module}.api_url", lambda *_: None)
    monkeypatch.setattr("cluster.server.submit.accepted", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / ".muster-job").mkdir()
    (tmp_path / ".muster-job" / "run.yaml").write_text("train: {steps: 9}")  # of a job that submits another
    (tmp_path / "quickstart").write_text("train: {steps: 7}")  # no base of what stands on the preset
    (tmp_path / "sub" / "run.yaml").write_text("base: quickstart\ntrain: {steps: 3}\n")
    (tmp_path / "sub" / "sweep.yaml").write_text("{base: run.yaml, grid: {}, axes: {optim.lr: [1.0e-3]}}")
    return found


@pytest.mark.parametrize("name", ["quickstart", "sub/run.yaml", "../run.yaml"])
def test_a_job_carries_its_config_and_its_command_shows_nothing_of_it(sent, tmp_path, monkeypatch, name):
    (tmp_path.parent / "run.yaml").write_text("train: {steps: 3}\n")
    given = ["optim.lr=1e-3", f"tracking.uri={URI}", "run.name=2026-01-05", "run.root=/shared", "data.path=/shared/d",
             "model.vocab_size=4096"]  # fmt: skip
    submit(name, given)
    message, files = sent.job()
    assert message.job.command == "muster train .muster-job/run.yaml"
    assert PASSWORD not in message.model_dump_json()
    (tmp_path / "there" / ".muster-job").mkdir(parents=True)
    (tmp_path / "there" / "quickstart").write_text("train: {steps: 7}")
    here = load(name, [*given, "cluster.address=null", "cluster.cpus_per_worker=8", "cluster.gpus_per_worker=0"])
    monkeypatch.chdir(tmp_path / "there")
    Path(CONFIG).write_text(files[f"work/{CONFIG}"])
    there = load(CONFIG)
    assert there == here
    assert there.defaults == here.defaults
    assert PASSWORD in there.tracking.uri


def test_a_sweep_as_a_job_carries_its_definition(sent, tmp_path):
    given = [
        f"set.tracking.uri={URI}",
        "name=a",
        "root=/shared",
        "set.data.path=/shared/d",
        "set.train.steps=600",
        "set.model.vocab_size=4096",
    ]
    submit_sweep("sub/sweep.yaml", given, gpus=2)
    message, files = sent.job()
    assert message.job.command == "muster sweep run .muster-job/sweep.yaml --gpus=2"
    assert PASSWORD not in message.model_dump_json()
    Path(SWEEP).write_text(files[f"work/{SWEEP}"])
    assert load_sweep(SWEEP) == load_sweep("sub/sweep.yaml", [*given, "set.cluster.address=null"])


@pytest.mark.slow
def test_without_muster_a_password_on_the_command_line_is_refused(tmp_path):
    whole = [sys.executable, "-P", "-m", "trainer", "quickstart", f"run.root={tmp_path}", f"tracking.uri={URI}"]
    done = subprocess.run(whole, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=90)
    assert done.returncode == 2
    assert "tracking.uri holds a password" in done.stderr
    assert "set MLFLOW_TRACKING_URI" in done.stderr
    assert PASSWORD not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", [f"tracking={{uri: '{URI}'}}", URI, f"{URI}=1"])
def test_wherever_it_stands_in_an_argument(argument):
    from trainer.__main__ import _refuse_passwords

    with pytest.raises(ConfigError, match="holds a password") as refused:
        _refuse_passwords(["quickstart", argument])
    assert PASSWORD not in str(refused.value)
    _refuse_passwords(["quickstart", "tracking.uri=http://127.0.0.1:5000", "run.name=a@b"])

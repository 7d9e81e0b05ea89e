"""`muster submit`, `jobs`, `logs`, `stop`, `retry` on one real Ray with three CPUs: gangs, priorities, tokens."""

import json
import os
import signal
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from muster_cluster import ROOT, Cluster, started, status

from trainer.record.lines import read_events

CONFIG = """
run: {{root: {root}}}
model: {{num_layers: 2, hidden_size: 32, num_heads: 2, num_experts: 4, expert_size: 32}}
train: {{steps: 20, global_batch: 4, seq_len: 32, precision: fp32, eval_sequences: 4, sample_tokens: 4}}
data: {{path: {data}}}
parallel: {{dp: 2}}
cluster: {{cpus_per_worker: 1}}
tracking: {{enabled: false, export_model: false}}
plugins: [tools/mine.py]
"""
SWEEP = """
name: swept
root: {root}
base: run.yaml
grid: {{}}
axes: {{optim.lr: [1.0e-3, 2.0e-3]}}
"""
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:ssl=None:DeprecationWarning"),  # from inside Ray
]

PLUGIN = "import os; open({out!r}, 'w').write(' '.join(sorted(os.listdir())))"


@pytest.fixture(scope="module")
def cluster(tiny_data, tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    user, runs = folder / "user", folder / "runs"
    (user / "models").mkdir(parents=True)
    (user / "models" / "__init__.py").write_text("raise RuntimeError('the user has a folder of this name')")
    (user / "tools").mkdir()
    (user / "tools" / "mine.py").write_text(PLUGIN.format(out=str(folder / "plugin_saw")))
    (user / ".gitignore").write_text("secret.txt\n")
    (user / "secret.txt").write_text("not for the cluster")
    (user / "run.yaml").write_text(CONFIG.format(root=runs, data=tiny_data))
    (user / "sweep.yaml").write_text(SWEEP.format(root=runs))
    with started(folder, user, runs) as found:
        yield found


def test_nobody_is_answered_without_the_token(cluster):
    assert stat.S_IMODE(cluster.token.stat().st_mode) == 0o600
    ours = [cluster.url + path for path in ("/api/jobs", "/api/machines", "/api/now", "/metrics")]
    rays = [cluster.ray_url + path for path in ("/api/jobs/", "/api/version", "/api/v0/nodes")]
    for url in (*ours, *rays):
        assert status(url) == 401
        assert status(url, "0" * 64) in (401, 403)
        assert status(url, cluster.token.read_text()) == 200
    body = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"{cluster.ray_url}/api/jobs/", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == 401


@pytest.mark.parametrize("url", ["url", "ray_url"])
def test_the_server_and_rays_dashboard_listen_on_loopback(cluster, url):
    port = int(getattr(cluster, url).rpartition(":")[2])
    below = psutil.Process(cluster.head.pid).children(recursive=True)
    listening = [c.laddr for p in below for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == port} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parallel.dp=8", "train.global_batch=8"], ["asks for 8 CPUs; the cluster has 3 (1 node x 3)", "--queue"]),
        (["run.root=runs"], ["run.root=runs", "every machine"]),
        (["train.stps=1"], ["train.stps", "did you mean train.steps"]),
        (["data.path=secret.txt"], ["data.path=secret.txt is not sent", ".gitignore"]),
        (["parallel.tp=3"], ["tp=3", "model.num_heads"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_sent(cluster, arguments, words):
    out = cluster.muster("submit", "run.yaml", *arguments, code=2)
    assert out.startswith("muster: ")
    assert len(out.splitlines()) <= 4
    for word in words:
        assert word in out
    assert not cluster.runs.exists()


def test_a_wrong_token_and_an_open_cluster_are_refused(cluster, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("TEST_TOKEN", str(tmp_path / "token"))
    assert "refuses the token" in cluster.muster("jobs", code=2)
    monkeypatch.setenv("TEST_TOKEN", str(tmp_path / "none"))
    assert "no token" in cluster.muster("jobs", code=2)
    monkeypatch.delenv("TEST_TOKEN")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    for command in (["cluster", "up"], ["jobs", "--address", cluster.url]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cluster.cli", *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "RAY_AUTH_MODE=disabled" in done.stderr


@dataclass
class Story:
    first: str
    """Trained until it was stopped."""
    second: str
    """Waited behind it, then did not start."""
    urgent: str
    """Came last and was next."""
    waiting: dict[str, dict]
    """What the jobs were while the first one ran."""
    output: str
    """What `muster logs --follow` printed of the urgent one."""
    machines: list[dict]
    """As the server told while the first one ran."""


@pytest.fixture(scope="module")
def story(cluster) -> Story:
    first = cluster.submit("run.name=first", "train.steps=100000")
    too_large = cluster.submit("run.name=large", "parallel.dp=8", "train.global_batch=8", "--queue", "--priority", "9")
    second = cluster.submit("run.name=second")
    urgent = cluster.submit("run.name=urgent", "--priority", "5")
    cluster.wait(lambda: cluster.steps("first") >= 5)
    server = cluster.server_process()
    server.send_signal(signal.SIGKILL)
    server.wait(30)
    cluster.wait(cluster.reaches_ray)  # the next one
    waiting = {id: cluster.job(id) for id in (first, too_large, second, urgent)}
    cluster.wait(lambda: any(machine["uses"] for machine in cluster.machines()))
    machines = cluster.machines()
    cluster.muster("stop", first)
    cluster.muster("stop", second)
    cluster.muster("stop", too_large)
    return Story(first, second, urgent, waiting, cluster.muster("logs", urgent, "--follow"), machines)


def test_gangs_wait_whole_and_in_order(cluster, story):
    states = [job["state"] for job in story.waiting.values()]
    assert states == ["RUNNING", "QUEUED", "QUEUED", "QUEUED"]
    assert [job["ahead"] for job in story.waiting.values()] == [0, 0, 2, 1]
    seen = [job["outlook"] for job in story.waiting.values()]
    assert seen[0]["step"] >= 5
    assert (seen[0]["steps"], seen[0]["eta"] > 1) == (100000, True)
    assert [each["why"] for each in seen[1:]] == [
        "no room even on an empty cluster: 8 x (1 CPU); waits for machines to join",
        f"1 ahead of it: {story.urgent}",
        f"waits for room for 2 x (1 CPU) beside {story.first}",
    ]
    first, second, urgent = (cluster.job(id) for id in (story.first, story.second, story.urgent))
    assert second["state"] == "CANCELLED"
    assert "started" not in second
    ended = [event for event in read_events(cluster.runs / "first") if event["event"] == "attempt_ended"][-1]["time"]
    assert urgent["started"] >= ended >= first["started"]


def test_the_machines_and_what_uses_them_are_told(cluster, story):
    [machine] = story.machines
    assert (machine["cpus"], machine["cpus_free"], machine["gpus"]) == (3, 1, 0)
    assert machine["uses"] == [{"by": story.first, "cpus": 2, "gpus": 0}]


def test_stop_writes_a_checkpoint_first(cluster, story):
    assert cluster.job(story.first)["state"] == "STOPPED"
    events = read_events(cluster.runs / "first")
    [end] = [event for event in events if event["event"] == "attempt_ended"]
    assert end["status"] == "STOPPED"
    assert [event["step"] for event in events if event["event"] == "checkpoint"][-1] == end["step"]


def test_a_job_is_trained_to_its_end_by_what_was_sent(cluster, story):
    cluster.wait(lambda: cluster.job(story.urgent)["state"] != "RUNNING")
    assert cluster.job(story.urgent)["state"] == "FINISHED"
    [launched] = [event for event in read_events(cluster.runs / "urgent") if event["event"] == "resolved"]
    assert launched["submitted"] == cluster.job(story.urgent)["submitted"]  # what it waited is in its goodput
    assert "finished at step 20" in story.output
    assert "finished at step 20" in cluster.muster("logs", story.urgent)
    sent = (cluster.runs.parent / "plugin_saw").read_text().split()
    assert {"models", "run.yaml", "tools"} <= set(sent)
    assert "secret.txt" not in sent


def test_output_by_rank_is_read_from_the_runs_folder(cluster, story):
    logs = cluster.runs / "urgent" / "logs"
    [own] = logs.glob("*-rank-0001.log")
    assert cluster.muster("logs", story.urgent, "--rank", "1") == own.read_text() != ""
    (logs / "attempt-02-rank-0001.log").write_text("of the newest attempt\n")
    assert cluster.muster("logs", story.urgent, "--rank", "1") == "of the newest attempt\n"
    for file in logs.glob("*-rank-0001.log"):
        file.unlink()
    assert "no output of rank 1" in cluster.muster("logs", story.urgent, "--rank", "1", code=2)
    assert "ranks 0 to 1" in cluster.muster("logs", story.urgent, "--rank", "2", code=2)


def test_jobs_are_listed_and_one_is_retried(cluster, story):
    listed = json.loads(cluster.muster("jobs", "--json"))
    assert [job["id"] for job in listed][:1] == [story.first]
    assert "FINISHED" in cluster.muster("retry", story.urgent, code=2)
    again = cluster.muster("retry", story.second).splitlines()[0]
    job = cluster.job(again)
    assert (job["retry_of"], job["run_dir"]) == (story.second, str(cluster.runs / "second"))
    assert again in cluster.muster("submit", "run.yaml", "run.name=second", code=2)
    cluster.muster("stop", again, "--now")
    assert cluster.job(again)["state"] in ("STOPPED", "CANCELLED")
    assert "no job" in cluster.muster("status", "job-none", code=2)


@pytest.mark.slow
def test_a_job_that_failed_says_why_in_its_own_words(cluster):
    id = cluster.submit("run.name=failing", "train.init_from=/nowhere/at/all")
    cluster.wait(lambda: cluster.job(id)["state"] not in ("QUEUED", "RUNNING"))
    job = cluster.job(id)
    assert (job["state"], job["exit_code"]) == ("FAILED", 2)
    assert job["reason"] == "train.init_from=/nowhere/at/all: no such folder"
    [line] = [line for line in cluster.muster("jobs").splitlines() if line.startswith(id)]
    assert line.endswith("failing  train.init_from=/nowhere/at/all: no such folder")
    assert "no such folder" in cluster.muster("logs", "failing")  # by its run's name


@pytest.mark.slow
def test_a_retried_job_goes_on_from_its_checkpoint(cluster, story):
    again = cluster.muster("retry", story.first).splitlines()[0]
    [stopped] = [event for event in read_events(cluster.runs / "first") if event["event"] == "attempt_ended"]
    cluster.wait(lambda: cluster.steps("first") >= stopped["step"] + 5)
    assert [e["step"] for e in read_events(cluster.runs / "first") if e["event"] == "resumed"] == [stopped["step"]]
    cluster.muster("stop", again)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["root=runs"], "root=runs is a relative path"),
        (["--gpus", "1"], "a trial takes 2 devices"),
        (["--gpus", "4"], "--gpus 4: the cluster has room for 3 processes of 1 CPU and"),
        (["set.data.path=secret.txt"], "data.path=secret.txt is not sent"),
        (["base=../outside.yaml"], "outside.yaml is not inside"),
    ],
)
def test_a_mistake_in_a_sweep_is_found_before_it_is_sent(cluster, arguments, words):
    (cluster.user.parent / "outside.yaml").write_text("{}")
    out = cluster.muster("sweep", "submit", "sweep.yaml", *arguments, code=2)
    assert out.startswith("muster: ")
    assert words in out
    assert not (cluster.runs / "swept").exists()


@pytest.mark.slow
def test_a_sweep_is_a_job(cluster):
    id = cluster.muster("sweep", "submit", "sweep.yaml", "--gpus", "2", "--priority", "3").splitlines()[0]
    assert id in cluster.muster("sweep", "submit", "sweep.yaml", code=2)
    cluster.wait(lambda: cluster.job(id)["state"] not in ("QUEUED", "RUNNING"))
    job = cluster.job(id)
    assert (job["state"], job["workers"], job["most"], job["run_dir"]) == (
        "FINISHED",
        2,
        2,
        str(cluster.runs / "swept"),
    )
    assert "2/2 trials finished" in cluster.muster("status", id)
    for rate in ("0.001", "0.002"):
        [launched] = [
            e for e in read_events(cluster.runs / "swept" / "trials" / f"lr{rate}") if e["event"] == "resolved"
        ]
        assert "submitted" not in launched  # what the sweep waited is none of its trials' time
        assert cluster.steps(f"swept/trials/lr{rate}") >= 20


def test_what_was_sent_and_trained_is_its_owners_alone(cluster, story):
    queue, runs = cluster.runs.parent / "queue", cluster.runs
    assert list(queue.glob("*.zip"))
    wide = [path for folder in (queue, runs) for path in (folder, *folder.rglob("*")) if path.lstat().st_mode & 0o077]
    assert [path for path in wide if not path.is_symlink()] == []


def test_nobody_prints_the_token(cluster, story):
    token = cluster.token.read_text()
    written = [path for folder in ("queue", "runs", "head.log") for path in below(cluster.runs.parent / folder)]
    assert written
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert cluster.printed
    assert not [text for text in cluster.printed if token in text]


def below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]

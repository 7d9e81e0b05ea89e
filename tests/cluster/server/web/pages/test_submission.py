"""A run that a page submits: the job that `muster submit` makes of it, and nothing that a page may not ask for."""

import io
import zipfile

import pytest
from dashboards import TOKEN, serving, write_run
from hostile_messages import submit, zipped
from queues import Queue

from cluster.gangs.ray_nodes import Machine
from cluster.gangs.share import Node
from cluster.server.jobs.ray_process import RayProcess
from cluster.server.outlook import gang_words
from cluster.server.web import auth
from configs import load

FORM = {"preset": "quickstart", "overrides": ["train.steps=7", "parallel.dp=2"], "priority": 3}
FREE = Node(0.5, 0)
"""Of the machine, so that nothing starts."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.gangs.ray_nodes.machines", lambda: [Machine("a", "10.0.0.1", FREE, Node(4, 0), "one")])
    monkeypatch.setattr(RayProcess, "ask", lambda self, gangs: None)
    monkeypatch.setattr(RayProcess, "_places", lambda self: [])
    for name in ("runs", "queue"):
        (tmp_path / name).mkdir()
    return Queue(tmp_path / "queue")


@pytest.fixture
def server(here, tmp_path):
    with serving([tmp_path / "runs"], board=here.board) as found:
        here.tick()
        yield found


def form(tmp_path, **changed):
    asked = FORM | changed
    return asked | {"overrides": [f"run.root={tmp_path / 'runs'}", *asked["overrides"]]}


def package(here, id) -> dict[str, bytes]:
    """Its files by name."""
    with zipfile.ZipFile(io.BytesIO(here.queue.content(here.jobs[id]))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_is_the_job_of_the_command_in_an_empty_folder(server, here, muster, tmp_path, monkeypatch):
    asked = form(tmp_path)
    answer = server.post("/api/submit", asked | {"overrides": [*asked["overrides"], "run.name=one"]})
    assert answer.status == 200, answer.json
    own = here.jobs[answer.json["id"]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    code, _, err = muster(
        "submit", "quickstart", *asked["overrides"], "run.name=two", "--priority=3", f"--address=http://{server.host}"
    )
    assert (code, err) == (0, "")
    [typed] = [job for job in here.jobs.values() if job.id != own.id]
    described = [
        job.model_dump(exclude={"id", "submitted", "time", "sha256", "name", "run_dir"}) for job in (own, typed)
    ]
    assert described[0] == described[1]
    assert (own.run_dir, own.state, own.workers) == (str(tmp_path / "runs" / "one"), "QUEUED", 2)
    first, second = package(here, own.id), package(here, typed.id)
    assert first.keys() == second.keys() == {"message.json", "work/", "work/.muster-job/run.yaml"}
    file = tmp_path / "run.yaml"
    file.write_bytes(first["work/.muster-job/run.yaml"])
    kept = ["cluster.address=null", "cluster.cpus_per_worker=2", "cluster.gpus_per_worker=0"]
    assert load(file) == load("quickstart", [*asked["overrides"], "run.name=one", *kept])
    assert first["work/.muster-job/run.yaml"].replace(b"one", b"two") == second["work/.muster-job/run.yaml"]


def test_a_run_that_was_planned_as_a_text(server, here, tmp_path):
    text = "base: quickstart\ntrain: {steps: 9}\nrun: {name: own}\n"
    told = server.post("/api/plan", {"text": text, "overrides": ["optim.lr=0.01"], "gpus": 4, "gpu": "cpu"}).json
    assert (told["run"], told["overrides"]) == ("own", ["optim.lr=0.01", "parallel.dp=4"])
    id = server.post("/api/submit", form(tmp_path, preset="", text=text, overrides=told["overrides"])).json["id"]
    file = tmp_path / "run.yaml"
    file.write_bytes(package(here, id)["work/.muster-job/run.yaml"])
    run = load(file)
    assert (run.run.name, run.train.steps, run.optim.lr, run.parallel.dp) == ("own", 9, 0.01, 4)


def test_the_form_offers_the_folders_of_the_server_and_of_its_jobs(here, tmp_path):
    (tmp_path / "shared").mkdir()
    with serving([tmp_path / "runs"], board=here.board) as server:
        assert server.get("/api/plan").json["roots"] == [str(tmp_path / "runs")]
        here.send(zipped(submit("job-a", run_dir=str(tmp_path / "shared" / "one"))))
        assert server.get("/api/plan").json["roots"] == [str(tmp_path / "runs"), str(tmp_path / "shared")]


REFUSED = [
    ({"overrides": ["run.root=/elsewhere"]}, "is not a folder that this server shows"),
    ({"overrides": ["run.root=runs"]}, "is not a folder that this server shows"),
    ({"overrides": ["run.name=there"]}, "there is a run there in"),
    ({"overrides": ["run.name=../x"]}, "run.name"),
    ({"overrides": ["data.path=mine"]}, "data.path=mine is not absolute, and a page sends no files"),
    ({"overrides": ["train.init_from=mine"]}, "train.init_from=mine is not absolute"),
    ({"overrides": ["plugins=[mine.py]"]}, "plugins are not loaded here"),
    ({"overrides": ["plugins=[/shared/mine.py]"]}, "plugins are not loaded here"),
    ({"overrides": ["model.from=/shared/model"]}, "folders are not read here"),
    ({"preset": "", "text": "base: /shared/config.yaml"}, "files are not read here"),
    ({"overrides": ["train.steps=x"]}, 'train.steps="x": should be a whole number'),
    ({"overrides": ["parallel.dp=8", "cluster.cpus_per_worker=2"]}, "asks for 16 CPUs; the cluster has 4"),
    ({"overrides": ["parallel.dp=200000", "train.global_batch=200000"]}, "a job has at most 100000"),
]


def test_what_a_page_may_not_submit(server, here, tmp_path):
    (tmp_path / "runs" / "there").symlink_to("nowhere")
    for changed, words in REFUSED:
        answer = server.post("/api/submit", form(tmp_path, **changed))
        assert (answer.status, words in answer.json["error"]) == (409, True), answer.json
    assert here.jobs == {}
    assert [path.name for path in here.queue.here.iterdir()] == ["journal.jsonl"]


def test_what_a_run_would_reserve_is_told_before_it_is_queued(server, here, tmp_path):
    told = server.post("/api/submit/needs", form(tmp_path)).json
    assert here.jobs == {}
    id = server.post("/api/submit", form(tmp_path)).json["id"]
    assert told == {"gang": gang_words(here.jobs[id]), "why": ""}
    large = form(tmp_path, overrides=["parallel.dp=8", "cluster.cpus_per_worker=2"])
    told = server.post("/api/submit/needs", large).json
    assert (told["gang"], "asks for 16 CPUs; the cluster has 4" in told["why"]) == ("", True)
    assert ("tick the box" in told["why"], "--queue" in told["why"]) == (True, False)
    assert server.post("/api/submit/needs", large | {"queue": True}).json["gang"] == "8 x (2 CPU)"


def test_a_run_is_queued_once_and_later_if_it_is_too_large_now(server, here, tmp_path):
    large = form(tmp_path, overrides=["parallel.dp=8", "cluster.cpus_per_worker=2"])
    assert server.post("/api/submit", large | {"queue": True}).json["workers"] == 8
    again = server.post("/api/submit", large | {"queue": True})
    assert (again.status, "(QUEUED): stop it, or choose another name" in again.json["error"]) == (409, True)
    assert len(here.jobs) == 1


def test_only_a_page_of_the_server_with_a_session_submits(server, here, tmp_path):
    cookie = f"muster_dashboard={auth.session_of(TOKEN)}"
    for headers, status in (
        ({"cookie": cookie}, 403),
        ({"cookie": cookie, "origin": "http://evil.example"}, 403),
        ({"cookie": cookie, "origin": f"http://{server.host}", "sec_fetch_site": "cross-site"}, 403),
        ({"cookie": cookie, "origin": f"http://{server.host}", "content_type": "text/plain"}, 415),
        ({"origin": f"http://{server.host}"}, 401),
    ):
        assert server.post("/api/submit", form(tmp_path), authorization=None, **headers).status == status
    assert here.jobs == {}
    for body in (
        form(tmp_path) | {"command": "id"},
        form(tmp_path) | {"priority": 2**40},
        form(tmp_path, queue="maybe"),
    ):
        assert server.post("/api/submit", body).status == 400
    assert here.jobs == {}
    own = {"cookie": cookie, "origin": f"http://{server.host}"}
    assert server.post("/api/submit", form(tmp_path), authorization=None, **own).status == 200
    assert server.get("/api/submit").status == 404


def test_where_no_machine_is_known_or_no_queue_is(here, tmp_path, monkeypatch):
    monkeypatch.setattr(here.scheduler, "start", lambda: None)
    monkeypatch.setattr(here.scheduler, "end", lambda: None)
    with serving([tmp_path / "runs"], board=here.board) as server:
        assert (
            "the machines are not known: not connected yet" in server.post("/api/submit", form(tmp_path)).json["error"]
        )
    write_run(tmp_path / "runs" / "one", 1)
    with serving([tmp_path / "runs"]) as server:
        assert server.get("/api/plan").json["roots"] is None
        answer = server.post("/api/submit", form(tmp_path))
        assert (answer.status, "this server has no queue" in answer.json["error"]) == (409, True)
        assert server.post("/api/submit/needs", form(tmp_path)).status == 409

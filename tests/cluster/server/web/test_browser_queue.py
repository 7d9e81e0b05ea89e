"""The queue and the machines on the page of what needs a person, in a real browser, and what is done from there."""

import zipfile

import pytest
import yaml
from browsers import CHROMIUM, logged_in
from dashboards import serving, write_run
from hostile_messages import submit, zipped
from queues import Queue

from cluster.gangs.ray_nodes import Machine
from cluster.gangs.share import Node
from cluster.server.jobs.ray_process import RayProcess

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

MACHINES = [
    Machine("a", "10.0.0.1", Node(30.0, 3.0), Node(32.0, 8.0), "gpu-01"),
    Machine("b", "10.0.0.2", Node(32.0, 8.0), Node(32.0, 8.0), "gpu-02"),
]


WIDTHS = """() => [document.documentElement, ...document.querySelectorAll("dialog")]
    .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.tagName)"""
"""What is wider than the screen, or than the dialog that it is in."""


class Running:
    """A job API at which everything that was started runs on, until it is asked to stop."""

    def __init__(self):
        self.stopped: list[str] = []

    def get_job_info(self, id):
        raise ConnectionError("nobody answers")  # of which nothing follows

    def list_jobs(self):
        return []

    def stop_job(self, id):
        self.stopped.append(id)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.gangs.ray_nodes.machines", lambda: MACHINES)
    monkeypatch.setattr(RayProcess, "ask", lambda self, gangs: None)
    monkeypatch.setattr(RayProcess, "_places", lambda self: [])
    (tmp_path / "queue").mkdir()
    queue = Queue(tmp_path / "queue", Running())
    for id, name, workers, priority in (
        ("job-dense-aaaaaa", "dense", 1, 0), ("job-lost-bbbbbb", "lost", 1, 0),
        ("job-wide-cccccc", "wide", 64, 0), ("job-urgent-dddddd", "urgent", 32, 5),
    ):  # fmt: skip
        run_dir = str(tmp_path / "runs" / name)
        queue.send(
            zipped(submit(id, name=name, workers=workers, most=workers, gpus=1, priority=priority, run_dir=run_dir))
        )
    for id in ("job-dense-aaaaaa", "job-lost-bbbbbb"):
        queue.queue.begin(id)
        queue.queue.settle(id, started=True)
    queue.queue.end("job-lost-bbbbbb", state="LOST", reason="the cluster that ran it is gone")
    write_run(tmp_path / "runs" / "dense", 5, of=40, status=None)
    return queue


@pytest.fixture(params=[1440, pytest.param(400, marks=pytest.mark.slow)])
def watched(here, browser, request):
    with serving([here.queue.here.parent / "runs"], board=here.board) as server, logged_in(browser, server) as watched:
        found = watched.page
        found.set_viewport_size({"width": request.param, "height": 900})
        found.goto("/now")
        expect(found.locator(".machines")).to_contain_text("gpu-01")
        yield watched
        assert found.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def page(watched):
    return watched.page


def test_jobs_are_moved_cancelled_stopped_and_retried_from_the_page(here, page):
    expect(page.locator("h1")).to_contain_text("2 waiting")
    expect(page.locator("h1")).to_contain_text("5 of 16 GPUs busy")
    waiting = page.locator(".waiting tbody tr")
    expect(waiting).to_have_count(2)
    expect(waiting.nth(0)).to_contain_text("urgent")
    expect(waiting.nth(0)).to_contain_text("no room even on an empty cluster")
    expect(page.locator(".problem.failed")).to_contain_text("job-lost-bbbbbb is lost")
    expect(page.locator(".machines .boxes .full")).to_have_count(5)

    page.get_by_role("button", name="Priority of job-wide-cccccc").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Priority").fill("9")
    dialog.get_by_role("button", name="Set priority").click()
    expect(waiting.nth(0)).to_contain_text("wide")
    assert here.jobs["job-wide-cccccc"].priority == 9

    page.get_by_role("button", name="Cancel job-urgent-dddddd").click()
    dialog.get_by_role("button", name="Keep it waiting").click()
    assert here.jobs["job-urgent-dddddd"].state == "QUEUED"
    page.get_by_role("button", name="Cancel job-urgent-dddddd").click()
    dialog.get_by_role("button", name="Cancel the job").click()
    expect(waiting).to_have_count(1)
    assert here.jobs["job-urgent-dddddd"].state == "CANCELLED"

    page.get_by_role("button", name="Stop job-dense-aaaaaa").click()
    dialog.get_by_role("button", name="Stop after a checkpoint").click()
    expect(page.locator('.jobs tr[data-job="job-dense-aaaaaa"]')).to_contain_text("stopping")
    assert here.jobs["job-dense-aaaaaa"].stopping == "checkpoint"

    page.get_by_role("button", name="Retry job-lost-bbbbbb").click()
    dialog.get_by_role("button", name="Retry").click()
    expect(page.locator(".problem.failed")).to_have_count(0)
    [again] = [job for job in here.jobs.values() if job.retry_of]
    assert (again.retry_of, again.name) == ("job-lost-bbbbbb", "lost")
    assert again.id.startswith("job-lost-")


@pytest.mark.slow
def test_a_page_says_why_the_cluster_has_no_room_before_it_is_submitted(page):
    page.get_by_role("link", name="Plan a run").click()
    expect(page.get_by_role("link", name="Plan", exact=True)).to_have_attribute("aria-current", "page")
    page.goto("/plan?preset=quickstart&gpu=cpu&gpus=128&set=train.global_batch%3D128")
    page.get_by_role("button", name="Submit this").click()
    needs = page.get_by_role("dialog").locator(".needs")
    expect(needs).to_contain_text("It would be refused: asks for 128 GPUs; the cluster has 16")
    page.get_by_label("Queue it even if").check()
    expect(needs).to_have_text("It asks the cluster for 128 x (1 CPU, 1 GPU).")


@pytest.mark.slow
def test_a_job_leads_to_its_run(page):
    page.locator('.jobs tr[data-job="job-dense-aaaaaa"]').get_by_role("link", name="dense").click()
    expect(page.locator("h1")).to_contain_text("dense")


def test_a_plan_is_submitted_once_it_has_been_confirmed(here, watched, page):
    page.goto("/plan?preset=quickstart&gpu=cpu&gpus=16&set=train.global_batch%3D16")
    page.get_by_role("button", name="Submit this").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Do not submit")).to_be_focused()
    expect(dialog.locator(".needs")).to_have_text("It asks the cluster for 16 x (4 CPU, 1 GPU).")
    assert page.evaluate(WIDTHS) == []
    before = set(here.jobs)
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="Submit this").click()
    dialog.get_by_label("run.name").fill("dense")
    dialog.get_by_label("priority").fill("7")
    dialog.get_by_role("button", name="Submit", exact=True).click()
    expect(dialog.get_by_role("alert")).to_contain_text("there is a run dense in")
    assert set(here.jobs) == before
    assert ["409" in text for text in watched.wrong] == [True]  # the browser itself tells the refusal
    watched.wrong.clear()
    dialog.get_by_label("run.name").fill("from-a-page")
    dialog.get_by_role("button", name="Submit", exact=True).click()
    expect(dialog).to_contain_text("job-from-a-page-")
    [new] = set(here.jobs) - before
    job = here.jobs[new]
    assert (job.name, job.priority, job.workers, job.state) == ("from-a-page", 7, 16, "QUEUED")
    assert job.command == "muster train .muster-job/run.yaml"
    with zipfile.ZipFile(here.queue.package(new)) as archive:
        run = yaml.safe_load(archive.read("work/.muster-job/run.yaml"))
    assert (run["base"], run["train"], run["parallel"]) == ("quickstart", {"global_batch": 16}, {"dp": 16})
    dialog.get_by_role("button", name="To the queue").click()
    expect(page.locator(".waiting tbody tr").first).to_contain_text("from-a-page")


@pytest.mark.slow
def test_what_cannot_be_done_is_said(here, page):
    page.get_by_role("button", name="Priority of job-wide-cccccc").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Priority").fill("0.5")
    dialog.get_by_role("button", name="Set priority").click()
    expect(dialog).to_contain_text("whole number")
    assert here.jobs["job-wide-cccccc"].priority == 0

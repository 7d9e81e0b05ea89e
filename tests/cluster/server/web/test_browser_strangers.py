"""The pages over runs of strangers, and over runs that come, change and go while they are open, in a real browser."""

import json
import shutil
from urllib.parse import quote

import pytest
from browsers import CHROMIUM, Watched, rows
from dashboards import TOKEN, serving, write_run, write_stacks

from cluster.server.web.export.contents import opened
from cluster.server.web.export.page import write_pages
from models.tasks.samples import Table
from trainer.observe.samples import write_sample
from trainer.record.lines import Record
from trainer.run.notes import Notes, write_notes

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

expect.set_options(timeout=20_000)
PWNED = "</script><script>window.pwned = 1</script><img src=x onerror=window.pwned=1><b>bold</b>\x1b[31m\u202e\u2028"


@pytest.fixture
def strangers(tmp_path, browser):
    """A dashboard, and a logged-in page of it, over a run in which every text is a stranger's."""
    run = write_run(tmp_path / "runs" / PWNED.replace("/", "").replace("\x1b", ""), 3, status=None)
    record = Record(run, 2)
    record.event("resolved", derived=[f"{PWNED}=1: {PWNED}"], command=PWNED)
    record.event("attempt_started", world_size=1, device=PWNED, host=PWNED, versions={PWNED: PWNED}, git_commit=PWNED)
    record.event("failure", reason=PWNED, traceback=PWNED, step=2)
    record.event("straggler", rank=0, host=PWNED, step=3, times_median=2.0)
    record.event("config_changed", changed={PWNED: [PWNED, PWNED]})
    record.metrics({"step": 4, "loss": 0.5, "tokens": 40, PWNED: 1.0, "__proto__": 2.0, "constructor": 3.0})
    record.event("hang", reason=PWNED, step=4, phase=PWNED, seconds=9.0, bound=2.0, suspects=[0], stacks=[PWNED])
    record.event("attempt_ended", status="FAILED", reason=PWNED, step=4)
    record.close()
    write_notes(run, Notes(PWNED, {"project": PWNED}))
    (run / "config.yaml").write_text(json.dumps({"train": {"steps": 9, PWNED: PWNED}, PWNED: [PWNED]}))
    write_stacks(run, 0, [[PWNED.replace("\u2028", ""), 1, PWNED.replace("\u2028", "")]])
    write_sample(Table([PWNED], [[PWNED]]), run / "samples" / "step-00000001")
    for name in ("samples/step-00000002.txt", "samples/step-00000003.png", "logs/attempt-02-rank-0000.log"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(PWNED)
    write_run(tmp_path / "runs" / "other")
    with serving([run.parent]) as server:
        server.look()
        context = browser.new_context(base_url=f"http://{server.host}")
        context.request.post("/login", data={"token": TOKEN}, headers={"origin": f"http://{server.host}"})
        yield server, Watched(context, server.host), run
        context.close()


@pytest.mark.slow
def test_nothing_of_a_stranger_is_more_than_text(strangers, tmp_path):
    server, watched, run = strangers
    page, (id, other) = watched.page, (quote(each, safe="") for each in server.rows())
    where, text = f"/run/{id}", quote(PWNED)
    tabs = [f"{where}?tab={tab}" for tab in ("experts", "samples", "config", "logs", "files", text)]
    paths = [
        "/", "/runs", f"/runs?columns=name+{text}+metric:{text}&group={text}&sort={text}", f"/runs?q={text}",
        f"/runs?peek={id}&run={id}", where, f"{where}?metric={text}&x={text}", f"{where}?log={text}&from={text}&to=9",
        *tabs, f"/compare?run={id}&run={other}&metric={text}", f"/compare?run={id}&run={other}&base={text}&x={text}",
        f"/sweep/{text}", f"/{text}",
    ]  # fmt: skip
    for path in paths:
        page.goto(path)
        expect(page.locator("h1, .empty h2").first).to_be_visible() if path != paths[-1] else None
        page.wait_for_load_state("networkidle") if "/run" in path or "compare" in path else None
        untouched(page, path)
    page.goto(where)
    expect(page.locator("h1")).to_contain_text("window.pwned")
    for number, inside in (("2", ".sample"), ("3", ".config"), ("4", ".stack"), ("5", ".facts")):
        page.keyboard.press(number)
        expect(page.locator(inside).first).to_contain_text("window.pwned")
        untouched(page, number)
    written = []
    write_pages(opened([run, run.parent / "other"]), tmp_path, written.append)
    for file in written:
        page.goto(f"file://{file}")
        expect(page.locator("h1")).to_be_visible()
        untouched(page, file.name)
    assert [text for text in watched.wrong if "40" not in text and "file://" not in text] == []


def untouched(page, where):
    assert page.evaluate("window.pwned === undefined"), where
    assert page.locator("img[src=x]").count() == page.locator("main script, main b:text-is('bold')").count() == 0, where


@pytest.mark.slow
def test_what_is_under_the_pointer_stays_there(strangers):
    server, watched, run = strangers
    page = watched.page
    write_run(run.parent / "third", lr=0.5)
    server.look()
    page.goto("/runs?sort=name&columns=step+optim.lr")
    expect(rows(page)).to_have_count(3)
    shown = rows(page).all_text_contents()
    rows(page).last.hover()
    write_run(run.parent / "another", lr=0.25)
    record = Record(run.parent / "another", 1)
    record.event("resolved", began=1.0, derived=[], command="")  # so that it stands before all others
    record.close()
    with page.expect_response(lambda answer: "/api/columns" in answer.url) as answered:
        server.look()
    assert answered.value.json()["ids"] == ["another"]
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert rows(page).all_text_contents() == shown
    page.mouse.move(5, 5)
    expect(rows(page)).to_have_count(4)
    assert watched.wrong == []


@pytest.mark.slow
def test_a_run_that_is_deleted_while_its_pages_are_open(strangers):
    server, watched, run = strangers
    page = watched.page
    page.goto("/run/other")
    expect(page.locator(".numbers")).to_contain_text("of 4")
    table = page.context.new_page()
    table.goto("/runs")
    expect(rows(table)).to_have_count(2)
    shutil.rmtree(run.parent / "other")
    server.look()
    expect(page.locator("main")).to_contain_text("This run is gone")
    expect(rows(table)).to_have_count(1)
    assert watched.wrong == ["Failed to load resource: the server responded with a status of 404 (Not Found)"]

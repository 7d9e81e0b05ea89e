"""What the pages show while many runs are read for the first time: how far that is, and all that is there."""

import os
import re
import threading

import pytest
from browsers import CHROMIUM, logged_in, names
from dashboards import serving, write_run

from cluster.server.web.index.runs_index import RunsIndex

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

expect.set_options(timeout=20_000)


@pytest.fixture
def opened(monkeypatch):
    """Until this is set two runs are read, and any that is asked for."""
    event, read = threading.Event(), RunsIndex._read

    def some(self, patience):
        if event.is_set():
            return read(self, patience)
        if self.ready.is_set() and self._unread and self._unread[-1].id != "asked":
            return set()
        count = 1 if self.ready.is_set() else 2
        rest, self._unread = self._unread[:-count], self._unread[-count:]
        changed = read(self, 60.0)
        self._unread = rest
        return changed

    monkeypatch.setattr(RunsIndex, "_read", some)
    return event


@pytest.fixture
def dashboard(tmp_path, opened):
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    (tmp_path / "sweep" / "plan.json").write_text("{}")
    for age, name in enumerate(("run-3", "run-2", "run-1", "run-0", "asked", "sweep/trials/small")):
        config = write_run(tmp_path / name) / "config.yaml"
        os.utime(config, (2e9 - age, 2e9 - age))
    with serving([tmp_path]) as server:
        yield server


@pytest.mark.slow
def test_the_pages_say_how_far_it_is_and_go_on_by_themselves(dashboard, opened, browser):
    with logged_in(browser, dashboard) as found:
        page = found.page
        page.goto("/runs")
        reading = page.locator(".reading")
        expect(reading).to_have_text("2 of 6 runs are read, the newest first. The others follow by themselves.")
        assert reading.locator("progress").evaluate("bar => bar.value / bar.max") == pytest.approx(2 / 6)
        assert sorted(names(page)) == ["run-2", "run-3"]
        page.goto("/now")
        expect(page.locator("h1")).to_contain_text("Nothing needs you so far.")
        page.goto("/sweep")
        expect(page.locator("main")).to_contain_text("No sweep so far")
        page.goto("/compare?run=run-0&run=run-3")
        expect(page.locator(".notice")).to_have_text("Not read yet: run-0.")
        opened.set()
        expect(page.locator(".notice")).to_have_count(0)
        expect(page.locator("main")).to_contain_text("run-0")
        expect(reading).to_be_hidden()
        page.goto("/now")
        expect(page.locator("h1")).to_have_text(re.compile("^Nothing needs you\\. "))


@pytest.mark.slow
def test_what_changes_before_a_page_listens_is_not_missed(dashboard, opened, browser):
    with logged_in(browser, dashboard) as found:

        def late(route):
            opened.set()
            for _ in range(2):
                dashboard.look()
            route.continue_()

        found.page.route("**/api/changes", late)
        found.page.goto("/compare?run=run-0")
        expect(found.page.locator("aside")).to_contain_text("run-0")
        expect(found.page.locator(".reading")).to_be_hidden()


@pytest.mark.slow
def test_a_run_that_is_asked_for_is_shown_before_its_turn(dashboard, browser):
    with logged_in(browser, dashboard) as found:
        found.page.goto("/run/asked")
        expect(found.page.locator("h1")).to_have_text("asked")
        expect(found.page.locator(".reading")).to_contain_text("3 of 6 runs are read")
    assert dashboard.get("/api/runs/none").status == 404

"""A real browser for tests of pages, and what goes wrong in it."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from dashboards import TOKEN, Dashboard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Watched:
    """A page of which everything wrong is noted."""

    def __init__(self, context: Any, host: str) -> None:
        self.page, self.wrong = context.new_page(), []
        self.page.on("console", lambda said: self._said(said.type, said.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, host))

    def _said(self, kind: str, text: str) -> None:
        # That a font came seconds before the first text is drawn tells of a busy machine, not of the page.
        if kind in ("error", "warning") and "preloaded using link preload but not used" not in text:
            self.wrong.append(text)

    def _note(self, url: str, host: str) -> None:
        if not url.startswith((f"http://{host}/", "blob:", "data:")):
            self.wrong.append(f"asked outside: {url}")


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright  # which is not installed everywhere

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def rows(page: Any) -> Any:
    """Those of a page's table that are in sight."""
    return page.locator(".table .rows .row")


def names(page: Any) -> list[str]:
    """Of the runs and groups in the table of runs."""
    return page.locator(".table .rows .row .name a, .table .rows .row.group b").all_text_contents()


def drag(page: Any, plot: Any, begin: float, end: float) -> None:
    """From one share of a plot's width to another."""
    box = plot.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * begin, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, y, steps=4)
    page.mouse.up()


@contextlib.contextmanager
def logged_in(browser: Any, dashboard: Dashboard) -> Iterator[Watched]:
    """A page of a dashboard; at the end nothing has gone wrong in it."""
    context = browser.new_context(base_url=f"http://{dashboard.host}", viewport={"width": 1440, "height": 900})
    context.set_default_timeout(30_000)
    answer = context.request.post("/login", data={"token": TOKEN}, headers={"origin": f"http://{dashboard.host}"})
    assert answer.ok
    found = Watched(context, dashboard.host)
    yield found
    assert found.wrong == [], found.wrong
    context.close()

"""The page that compares runs in a real browser: their curves, means of runs of one setting, and what is saved."""

import csv
import math
import re

import pytest
from browsers import CHROMIUM, logged_in, rows
from dashboards import serving, write_run

from trainer.record.lines import read_metrics

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)


LONG = {"x" * 120: 12345.678901, "the-learning-rate-and-the-number-of-experts-" * 2: 98765.432109}
"""Runs of long names, one of which nothing breaks, by their learning rate."""


@pytest.fixture(scope="module")
def dashboard(root):
    for seed, lr in enumerate((0.001, 0.001, 0.5, 0.5)):
        write_run(root / f"dense-lr{lr}-seed{seed}", 6, of=6, lr=lr, grad_norm=2.0 + seed)
    write_run(root / "long", 40, of=40)
    write_run(root / "diverged", 30, of=30, loss=lambda step: math.nan if 10 <= step < 20 or step > 28 else 1.0 / step)
    for name, lr in LONG.items():
        write_run(root / name, 5, of=5, lr=lr)
    with serving([root]) as server:
        server.look()
        yield server


@pytest.fixture
def page(browser, dashboard):
    with logged_in(browser, dashboard) as watched:
        yield watched.page


@pytest.mark.slow
def test_compare_and_its_exports(page, root, tmp_path):
    page.goto("/compare?run=dense-lr0.001-seed0&run=dense-lr0.5-seed2&run=long")
    expect(page.locator(".keys-table")).to_contain_text("optim.lr")
    expect(page.locator(".compare .plot").first).to_have_attribute("aria-label", re.compile("long"))
    expect(page.locator(".compare .plot")).to_have_count(2)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export CSV").click()
    saved.value.save_as(tmp_path / "all.csv")
    with open(tmp_path / "all.csv", newline="") as file:
        head, *lines = csv.reader(file)
    column = head.index("dense-lr0.5-seed2")
    own = {float(line[0]): float(line[column]) for line in lines if line[column]}
    record = {each["step"]: each["loss"] for each in read_metrics(root / "dense-lr0.5-seed2") if "loss" in each}
    assert own == record
    for kind, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg")):
        with page.expect_download() as saved:
            page.get_by_role("button", name=kind).click()
        saved.value.save_as(tmp_path / kind)
        assert (tmp_path / kind).read_bytes().startswith(start)
    page.get_by_role("button", name="Leave out long").click()
    expect(page.locator("h1")).to_contain_text("2 runs")


@pytest.mark.slow
def test_runs_of_one_setting_are_compared_by_their_mean(page, tmp_path):
    page.goto("/runs?q=dense&sort=name&group=optim.lr")
    expect(rows(page)).to_have_count(2)
    for key in "jxjx":
        page.keyboard.press(key)
    page.keyboard.press("c")
    expect(page.locator("h1")).to_contain_text("4 runs in 2 groups by steps.")
    expect(page.get_by_label("Group")).to_have_value("optim.lr")
    page.goto(page.url + "&metric=grad_norm")
    plot = page.locator(".compare .plot").first
    both = r"lr 0.001 \(2\) 2.5 at step 6.*lr 0.5 \(2\) 4.5 at step 6"
    expect(plot).to_have_attribute("aria-label", re.compile(both))
    # Seeds 0 and 1 have 2 and 3, seeds 2 and 3 have 4 and 5.
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export CSV").click()
    saved.value.save_as(tmp_path / "means.csv")
    with open(tmp_path / "means.csv", newline="") as file:
        head, *lines = csv.reader(file)
    told = dict(zip(head, map(float, lines[-1]), strict=True))
    means = {"lr 0.001 (2)": 2.5, "lr 0.5 (2)": 4.5}
    bounds = {
        f"{name} (mean {sign} standard deviation)": pytest.approx(mean + (0.5**0.5 if sign == "+" else -(0.5**0.5)))
        for name, mean in means.items()
        for sign in "+−"
    }
    assert told == {"step": 6} | means | bounds
    with page.expect_download() as saved:
        page.get_by_role("button", name="SVG").click()
    saved.value.save_as(tmp_path / "means.svg")
    assert (tmp_path / "means.svg").read_text().count("fill-opacity") == 2
    page.get_by_label("Group").select_option("no groups")
    expect(plot).to_have_attribute("aria-label", re.compile("seed3"))


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "&group=optim.lr", "&group=train.steps", "&x=time&log=xy"])
def test_a_narrow_page_of_many_runs_with_long_names_does_not_scroll_sideways(page, more):
    page.set_viewport_size({"width": 400, "height": 860})
    ids = [*LONG, "dense-lr0.001-seed0", "dense-lr0.001-seed1", "dense-lr0.5-seed2", "dense-lr0.5-seed3", "long"]
    page.goto("/compare?" + "&".join(f"run={each}" for each in ids) + more)
    table = page.locator(".compare-runs")
    expect(table.locator("td a")).to_have_count(len(ids))
    expect(page.locator(".keys-table")).to_contain_text("optim.lr")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert table.evaluate("table => table.offsetWidth <= table.parentElement.clientWidth")


@pytest.mark.slow
def test_seeds_make_no_group_of_their_own(page):
    page.goto("/compare")
    code = """([differs, by]) => import('/static/js/pages/compare_groups.js').then((module) => [
        module.groupings(differs).map(([value]) => value),
        module.grouped(["a", "b", "c", "d"], differs, by).map(({ ids }) => ids),
    ])"""
    differs = [
        {"key": "run.seed", "values": [0, 1, 0, None]},
        {"key": "optim.lr", "values": [0.1, 0.1, 0.2, 0.2]},
        {"key": "model.top_k", "values": [2, 2, 2, None]},
    ]
    offered = ["", "seeds", "optim.lr", "model.top_k"]
    assert page.evaluate(code, [differs, "seeds"]) == [offered, [["a", "b"], ["c"], ["d"]]]
    assert page.evaluate(code, [differs, "optim.lr"]) == [offered, [["a", "b"], ["c", "d"]]]
    assert page.evaluate(code, [differs[1:], "seeds"])[0] == ["", "optim.lr", "model.top_k"]


@pytest.mark.slow
def test_where_a_curve_has_no_finite_number_is_marked(page):
    page.goto("/run/diverged")
    plot = page.locator(".big-chart .plot")
    expect(plot).to_have_attribute("aria-label", re.compile("no number from step 10 and in 1 more gap"))
    expect(page.locator(".big-chart .legend")).to_have_text("no number")
    page.goto("/compare?run=long&run=diverged")
    plot = page.locator(".compare .plot").first
    expect(plot).to_have_attribute("aria-label", re.compile("no number from step 10 and in 1 more gap"))

    def with_infinities(route):  # as a column may hold them, though no line of a record does
        answer = route.fetch()
        told = answer.json()
        for line in told["metrics"].values():
            line["infinite"] = [[4.0, 1], [6.0, -1]]
            line["y"] = [None if x in (4.0, 6.0) else y for x, y in zip(line["x"], line["y"], strict=True)]
        route.fulfill(response=answer, json=told)

    page.route("**/series?*", with_infinities)
    page.goto("/run/long")
    plot = page.locator(".big-chart .plot")
    expect(plot).to_have_attribute("aria-label", re.compile("infinite at 2 of its points, first at step 4$"))
    expect(page.locator(".big-chart .legend")).to_have_text("infinite")
    page.unroute_all(behavior="wait")

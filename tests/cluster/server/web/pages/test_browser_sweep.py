"""The pages Sweep and Plan in a real browser: what they show of real records and plans, and what they do when asked."""

import json
import re
import shutil
from urllib.parse import urlencode

import numpy as np
import pytest
from browsers import CHROMIUM, logged_in
from dashboards import serving
from sweeps import isoflop_of, made, planted, trained

from trainer.record.lines import Record

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

HOSTILE = '<img src=x onerror="document.title=1">'
AXES = {"optim.lr": [0.001, 0.002], "train.steps": [4, 8], "optim.schedule": ["cosine", "linear"]}
PATIENCE = 300_000
"""Milliseconds that a law may take to be worked out."""


@pytest.fixture(scope="module")
def grid(root, tiny_data):
    setting, trials, record = made(root, tiny_data, "grid", 4, grid={}, axes=AXES)
    trained(setting, trials[4], record, status="FAILED", steps=2)
    return setting, trials, record


@pytest.fixture(scope="module")
def sizes(root, tiny_data):
    noise = np.random.default_rng(0)
    setting, trials, _ = made(
        root, tiny_data, "sizes", loss=lambda t: planted(t, noise.normal(0, 0.004)), **isoflop_of(tiny_data)
    )
    return setting, trials


@pytest.fixture(scope="module")
def dashboard(root, grid, sizes):
    shutil.copytree(grid[0].sweep_dir, hostile := root / HOSTILE.replace("/", ""))
    plan = json.loads((hostile / "plan.json").read_text())
    plan["trials"][0]["variant"] = HOSTILE
    (hostile / "plan.json").write_text(json.dumps(plan))
    record = Record(hostile, 1)
    record.event("trial_ended", trial=plan["trials"][4]["name"], status="FAILED", kind="", reason=HOSTILE)
    record.close()
    with serving([root]) as server:
        server.look()
        server.get("/api/sweeps/sizes/law")  # it is worked out while the other tests go on
        yield server


@pytest.fixture
def watched(browser, dashboard):
    with logged_in(browser, dashboard) as found:
        yield found


@pytest.fixture
def page(watched):
    return watched.page


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(400, "dark"), (1440, "light")])
def test_every_page_is_whole_at_every_width(watched, width, theme):
    page = watched.page
    page.set_viewport_size({"width": width, "height": 860})
    page.emulate_media(color_scheme=theme)
    shown = {
        "/sweep": "3 sweeps",
        "/sweep/grid": "Best: ",
        "/plan": "It fits",
        "/plan?preset=quickstart&gpu=cpu": "It ",
    }
    for path, title in shown.items():
        page.goto(path)
        expect(page.locator("h1")).to_contain_text(title)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    page.goto("/sweep/none")
    expect(page.locator("main")).to_contain_text("There is no such sweep")
    assert [text for text in watched.wrong if "404" not in text] == []
    watched.wrong.clear()  # the browser itself tells the 404


@pytest.mark.slow
def test_a_search_shows_each_key_and_each_trial(page, grid):
    page.goto("/sweep")
    page.get_by_role("link", name="grid", exact=True).click()
    expect(page.locator("h1")).to_contain_text("of 4 finished trials")
    expect(page.locator(".axes .plane")).to_have_count(len(AXES))
    expect(page.locator(".axes .plane").last).to_have_attribute("aria-label", re.compile(r"optim.schedule.*5 points"))
    rows = page.locator(".trials-table .rows .row")
    expect(rows).to_have_count(len(grid[1]))
    expect(rows.nth(4)).to_contain_text("failed: as the test says")
    page.get_by_role("button", name="held-out loss").click()
    assert "sort=eval_loss" in page.url
    page.get_by_role("button", name="optim.schedule as a table").click()
    expect(page.locator("dialog tbody tr")).to_have_count(5)
    for key in ("Escape", "t", "j", "Enter"):
        page.keyboard.press(key)
    page.wait_for_url(re.compile("/run/grid"))


@pytest.mark.slow
def test_texts_stay_texts(page):
    page.goto("/sweep")
    page.locator("main table a").get_by_text("onerror").click()
    expect(page.locator(".trials-table")).to_contain_text(f"failed: {HOSTILE}")
    assert page.locator("main img").count() == 0
    page.goto(f"/plan?{urlencode([('preset', 'quickstart'), ('set', f'optim.name={HOSTILE}'), ('set', HOSTILE)])}")
    expect(page.locator("h1")).to_contain_text("It cannot run")
    expect(page.locator("#wrong-others")).to_contain_text("onerror")
    assert page.locator("main img").count() == 0
    assert page.title() != "1"


@pytest.mark.slow
def test_a_trial_that_begins_shows_by_itself(page, grid):
    setting, trials, record = grid
    page.goto("/sweep/grid")
    row = page.locator(".trials-table .rows .row").nth(5)
    expect(row).to_contain_text(f"of {trials[5].config.train.steps}")
    expect(row.locator("b")).to_have_count(0)
    trained(setting, trials[5], record, loss=1.2345)
    expect(row.locator("b")).to_have_text("1.234", timeout=60_000)
    expect(page.locator("h1")).to_contain_text("of 5 finished trials")


@pytest.mark.slow
def test_a_sweep_of_sizes_shows_what_its_law_says(page, dashboard, sizes):
    page.goto("/sweep/sizes")
    expect(page.locator("h1")).to_contain_text("Best for", timeout=PATIENCE)
    law = dashboard.get("/api/sweeps/sizes/law").json["law"]
    expect(page.locator("h1")).to_contain_text(f"Predicted {law['prediction']['run_loss']['value']:.3f} (")
    expect(page.locator(".curves .plane")).to_have_count(1)
    curved = sum(low["low"] is not None for low in law["kinds"][0]["budgets"])
    assert page.locator(".curves .plane path.mark").count() == len(sizes[1]) + curved
    expect(page.locator(".laws tbody tr")).to_have_count(len(law["laws"]))
    expect(page.locator(".score tbody tr")).to_have_count(len(law["score"]["held_back"]["scores"]))
    held = law["score"]["held_back"]
    expect(page.locator(".law-tables")).to_contain_text(f"{held['inside']} of {held['finished']} inside")
    expect(page.locator(".law-tables .command code")).to_have_text(law["next"]["command"])
    page.locator(".laws button").first.click()
    shown = page.locator("dialog tbody tr")
    expect(shown).to_have_count(len(law["laws"][0]["coefficients"]))
    page.keyboard.press("Escape")
    page.locator(".curves .plane").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".curves .tip")).to_contain_text("held-out loss")
    page.keyboard.press("p")
    page.keyboard.type("1e12")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("at=1e12"))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_a_plan_is_changed_and_stands_in_its_address(page):
    page.goto("/plan?preset=quickstart&gpu=cpu&gpus=2")
    expect(page.locator("h1")).to_contain_text("The quickest of", timeout=PATIENCE)
    page.get_by_label("steps").fill("1,234")
    page.get_by_label("steps").press("Tab")
    page.wait_for_url(re.compile("set=train.steps%3D1234"))
    row = page.locator(".topologies tr[aria-selected=false]").last
    step = row.locator("b").inner_text()
    expect(page.locator(".plan-numbers dd").first).not_to_have_text(step)
    row.click()
    page.wait_for_url(re.compile("set=parallel.zero_stage"))
    expect(page.locator(".plan-numbers dd").first).to_have_text(step)
    page.reload()
    expect(page.get_by_label("steps")).to_have_value("1234")
    expect(page.locator(".plan-numbers dd").first).to_have_text(step)
    page.get_by_role("button", name="Submit this").click()
    command = page.locator("dialog .command code").first
    expect(command).to_have_text(re.compile("^muster submit quickstart train.steps=1234 .*parallel.dp=[12]$"))
    page.keyboard.press("Escape")
    page.go_back()
    page.wait_for_url(lambda url: "zero_stage" not in url)


@pytest.mark.slow
def test_a_mistake_is_said_at_its_field(page, tmp_path):
    page.goto("/plan?preset=quickstart&gpu=cpu")
    expect(page.locator("h1")).to_contain_text("It fits")
    page.get_by_label("seq_len").fill("many")
    page.get_by_label("seq_len").press("Tab")
    said = page.locator("[id='wrong-train.seq_len']")
    expect(said).to_have_text('quickstart: train.seq_len="many": should be a whole number')
    expect(page.get_by_label("seq_len")).to_have_attribute("aria-invalid", "")
    page.goto("/plan")
    page.get_by_label("preset").select_option("own")
    page.get_by_label("config").fill(f"base: quickstart\nplugins: [{tmp_path}/x.py]\n")
    page.get_by_label("config").press("Tab")
    expect(page.locator("#wrong-yaml")).to_contain_text("plugins are not loaded here")
    page.get_by_label("config").fill("base: quickstart\ntrain: {steps: 9, global_batch: 64}\n")
    page.get_by_label("config").press("Tab")
    expect(page.get_by_label("steps")).to_have_value("9")
    expect(page.locator("h1")).not_to_contain_text("cannot")


@pytest.mark.slow
def test_keys_lead_to_both_pages(page):
    page.goto("/now")
    for letter, name in (("s", "Sweep"), ("p", "Plan")):
        expect(page.get_by_role("link", name=name, exact=True)).to_be_visible()
        page.keyboard.press("g")
        page.keyboard.press(letter)
        expect(page.get_by_role("link", name=name, exact=True)).to_have_attribute("aria-current", "page")


@pytest.mark.slow
def test_a_key_before_the_first_answer_leads_to_its_page(page):
    page.route("**/api/runs*", lambda route: page.wait_for_timeout(800) or route.continue_())
    page.goto("/now", wait_until="commit")
    expect(page.get_by_role("link", name="Plan", exact=True)).to_be_visible()
    page.keyboard.press("g")
    page.keyboard.press("p")
    expect(page.get_by_role("link", name="Plan", exact=True)).to_have_attribute("aria-current", "page")
    expect(page).to_have_url(re.compile("/plan"))

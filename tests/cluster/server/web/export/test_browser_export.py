"""Exported pages in a real browser, from a disk."""

import csv
import re

import pytest
from browsers import CHROMIUM, Watched, drag
from dashboards import write_run
from sweeps import begun, tiny_sweep
from sweeps import trained as as_trained

from cluster.server.web.export.contents import opened
from cluster.server.web.export.page import write_pages
from cluster.sweep.train.progress import write_plan
from cluster.sweep.train.setting import Setting

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

expect.set_options(timeout=20_000)
HOSTILE = '<img src=x onerror="document.title=1">'
STEPS = 1200


@pytest.mark.slow
def test_an_exported_page_needs_no_server(browser, root, tmp_path, tiny_data):
    for name, steps in (("trained", 8), ("long", STEPS), (HOSTILE, 2)):
        write_run(root / name, steps, of=steps, grad_norm=2.0, sequences=lambda step: 4 * step)
    (root / "trained" / "logs").mkdir()
    (root / "trained" / "logs" / "attempt-01-rank-0000.log").write_text(f"first line\n{HOSTILE}\n")
    setting = Setting(tiny_sweep(tmp_path, tiny_data, grid={}, axes={"optim.lr": [0.001, 0.002]}))
    (planned, _), record = setting.plan().trials, begun(setting.sweep)
    setting.write_sweep()
    write_plan(setting.sweep_dir, setting.plan())
    as_trained(setting, planned, record, loss=1.25)
    runs = opened([root / name for name in ("trained", "long", HOSTILE)])
    write_pages(runs, tmp_path, print, [setting.sweep_dir])
    context = browser.new_context(offline=True, viewport={"width": 1440, "height": 900})
    watched = Watched(context, "nowhere")
    page = watched.page
    page.goto(f"file://{tmp_path}/run-trained.html")
    chart = page.locator(".big-chart .plot")
    expect(chart).to_have_attribute("aria-label", re.compile("loss by step: train .* at step 8"))
    expect(page.locator(".grid .chart .plot").first).to_have_attribute("aria-label", re.compile("grad_norm by step"))
    for axis in ("examples", "tokens"):
        page.keyboard.press("x")
        expect(chart).to_have_attribute("aria-label", re.compile(f"loss by {axis}"))
    assert page.locator(".run-head button").count() == 0
    page.get_by_role("tab", name="Logs").click()
    expect(page.locator(".log")).to_contain_text(HOSTILE)
    page.get_by_label("Find in the log").fill("onerror")
    expect(page.locator(".log mark")).to_have_text("onerror")
    page.reload()
    expect(page.locator(".log")).to_contain_text(HOSTILE)
    page.goto(f"file://{tmp_path}/compare.html")
    expect(page.locator("h1")).to_contain_text("3 runs by steps")
    expect(page.locator(".compare-two")).to_contain_text(HOSTILE[:8])
    drag(page, page.locator(".compare .u-over").first, 0.25, 0.5)
    page.wait_for_function("location.hash.includes('from=')")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export CSV").click()
    saved.value.save_as(tmp_path / "all.csv")
    with open(tmp_path / "all.csv", newline="") as file:
        _, *lines = csv.reader(file)
    assert STEPS * 0.2 < float(lines[0][0]) < float(lines[-1][0]) < STEPS * 0.55
    page.get_by_role("link", name="long").click()
    expect(page.locator("h1")).to_have_text("long")
    page.goto(f"file://{tmp_path}/sweep-{setting.sweep.name}.html")
    expect(page.locator("h1")).to_contain_text("Held-out loss 1.250, of 1 finished trial")
    expect(page.locator(".trials-table .rows .row")).to_have_count(2)
    assert page.locator("main a").count() == 0  # its trials were not exported
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator("h1")).to_contain_text("Held-out loss 1.250")
    write_pages(opened([setting.sweep_dir / "trials" / planned.name]), tmp_path, print, [setting.sweep_dir])
    page.reload()
    page.locator(".trials-table").get_by_role("link", name=planned.name).click()
    expect(page.locator("h1")).to_contain_text(planned.name)
    with page.expect_download() as saved:
        page.keyboard.press("e")
    saved.value.save_as(tmp_path / "loss.csv")
    assert (tmp_path / "loss.csv").read_text().startswith("step,train,held-out\n")
    assert [text for text in watched.wrong if not text.startswith(f"asked outside: file://{tmp_path}/")] == []
    context.close()

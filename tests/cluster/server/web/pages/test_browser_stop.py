"""A run that trains is stopped from its page in a real browser, and goes on from the checkpoint that it wrote."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsers import CHROMIUM, logged_in
from dashboards import serving
from ranks import run_ranks
from support import tiny

from configs import ExitCode, to_yaml
from trainer.checkpoint.manifest import committed
from trainer.record.lines import read_metrics

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

PATIENCE = 60_000
"""Milliseconds until a run has started, or written its checkpoint."""
BEYOND = (
    """last => /step([\\d,]+)of/.exec(document.querySelector(".numbers").textContent)?.[1].replaceAll(",", "") > last"""
)
"""The page shows a later step."""


def steps_of(run_dir) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir) if "loss" in record]


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on_from_its_checkpoint(browser, root, tmp_path, tiny_data):
    run_dir = root / "endless"
    config = tiny(
        run={"name": run_dir.name, "root": str(root)}, data={"path": str(tiny_data)}, train={"steps": 10**6},
        checkpoint={"every": 10**6},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    with serving([root]) as server, logged_in(browser, server) as watched, ThreadPoolExecutor(1) as training:
        page, ends = watched.page, []
        now = page.locator(".run-head .now").first
        for attempt in (1, 2):
            going = training.submit(run_ranks, tmp_path, ["run.yaml"], 1)
            page.goto("/runs")  # the page of the run itself is opened once it has begun
            expect(page.locator(".table .rows .row")).to_contain_text("endless", timeout=PATIENCE)
            page.goto("/run/endless")
            button = page.get_by_role("button", name="Stop after a checkpoint")
            expect(button).to_be_enabled(timeout=PATIENCE)
            expect(now).to_have_text(" running" if attempt == 1 else " running, attempt 2")
            page.wait_for_function(BEYOND, arg=ends[-1] if ends else 0, timeout=PATIENCE)
            button.click()
            page.get_by_role("dialog").get_by_role("button", name="Stop after a checkpoint").click()
            expect(now).to_contain_text("stopped", timeout=PATIENCE)
            [(code, said)] = going.result()
            assert code == ExitCode.STOPPED, said
            ends.append(steps_of(run_dir)[-1])
            assert committed(run_dir)[-1] == ends[-1]
            expect(page.locator(".numbers")).to_contain_text(re.compile(rf"checkpoint at step{ends[-1]:,}"))
            expect(button).to_have_count(0)
    assert 0 < ends[0] < ends[1]
    assert steps_of(run_dir) == list(range(1, ends[1] + 1))

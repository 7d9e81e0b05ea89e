"""The dashboard's pages in a real browser: what they show of real records, and what they do when asked."""

import re

import pytest
import torch
from browsers import CHROMIUM, Watched, drag, names, rows
from dashboards import TOKEN, serving, write_run, write_stacks
from support import tiny, train_in_process

from models.tasks.samples import ImageGrid, Table
from trainer.observe.samples import write_sample
from trainer.record.lines import Record, read_metrics
from trainer.run.folder import prepare_run
from trainer.run.notes import read_notes

pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
from playwright.sync_api import expect

if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)

expect.set_options(timeout=20_000)
HOSTILE = '<img src=x onerror="document.title=1">'
STEPS = 1200
LONG = "x" * 120


def curved(step):
    return 3.0 + 5.0 / step


@pytest.fixture(scope="module")
def trained(root, tiny_data):
    config = tiny(
        run={"name": "trained", "root": str(root)}, data={"path": str(tiny_data)}, checkpoint={"every": 4},
        train={"steps": 8, "eval_every": 4, "sample_tokens": 4},
    )  # fmt: skip
    run_dir = prepare_run(config)
    assert train_in_process(run_dir) == 0
    (run_dir / "logs").mkdir()  # as `trainer.processes.output` does, which is not asked here
    (run_dir / "logs" / "attempt-01-rank-0000.log").write_text(f"first line\n{HOSTILE}\nlast line\n")
    return run_dir


@pytest.fixture(scope="module")
def dashboard(root, trained):
    for seed, lr in enumerate((0.001, 0.001, 0.5, 0.5)):
        write_run(root / f"dense-lr{lr}-seed{seed}", 6, of=6, lr=lr, grad_norm=2.0 + seed)
    write_run(root / "long", STEPS, of=STEPS, loss=curved)
    write_run(root / "failed", 3, status="FAILED", of=9, lr=0.25)
    write_run(root / LONG, 2)
    write_run(root / HOSTILE.replace("/", ""), 2)
    going = write_run(root / "going", 5, of=40, status=None)
    again = Record(going, 2)
    again.event("attempt_started", world_size=1, device="cpu")
    again.close()
    (going / "logs").mkdir()
    for attempt in (1, 2):
        (going / "logs" / f"attempt-{attempt:02d}-rank-0000.log").write_text(f"of attempt {attempt}\n")
    drawn = write_run(root / "drawn", 0) / "samples"
    record = Record(root / "drawn", 1)
    for step in (1, 2, 3):
        record.metrics({"step": step, "loss": 1.0 / step, "images": 4 * step, "images_per_second": 64.0})
    record.close()
    for step in (1, 2):
        write_sample(ImageGrid(torch.full((4, 3, 8, 8), step / 4)), drawn / f"step-{step:08d}")
    write_sample(Table(["label", "score"], [[HOSTILE, 0.25]]), drawn / "step-00000003")
    hung = write_run(root / "hung", 3, status=None)
    for rank, frames in enumerate(
        [("torch/distributed/c10d.py", 9, "all_reduce")] * 2 + [(HOSTILE + ".py", 148, "read_pages")]
    ):
        write_stacks(hung, rank, [frames, ("loop.py", 20, "train")])
    record = Record(hung, 1)
    record.event("hang", reason="no progress", step=4, phase="step", seconds=9.0, bound=2.0, suspects=[2], stacks=[])
    record.event("attempt_ended", status="FAILED", reason="no progress", step=3)
    record.close()
    with serving([root]) as server:
        server.look()
        yield server


@pytest.fixture
def context(browser, dashboard):
    found = browser.new_context(base_url=f"http://{dashboard.host}", viewport={"width": 1440, "height": 900})
    found.set_default_timeout(20_000)
    yield found
    found.close()


@pytest.fixture
def watched(context, dashboard):
    answer = context.request.post("/login", data={"token": TOKEN}, headers={"origin": f"http://{dashboard.host}"})
    assert answer.ok
    found = Watched(context, dashboard.host)
    yield found
    assert found.wrong == []


@pytest.fixture
def page(watched):
    return watched.page


def test_a_browser_logs_in_by_the_link(context, dashboard):
    page = context.new_page()
    page.goto("/runs")
    expect(page.locator("h1")).not_to_contain_text("Runs 8")
    assert "trained" not in page.content()
    page.goto(f"/login#{TOKEN}")
    page.wait_for_url(lambda url: "/login" not in url)
    expect(page.get_by_role("link", name="Compare")).to_be_visible()
    assert TOKEN not in page.url


@pytest.mark.slow
@pytest.mark.parametrize(("width", "theme"), [(400, "dark"), (1440, "light"), (2560, "dark")])
def test_every_page_is_whole_at_every_width(watched, width, theme):
    page = watched.page
    page.set_viewport_size({"width": width, "height": 860})
    page.emulate_media(color_scheme=theme)
    shown = {
        "/": "2 runs need you", "/runs": "Runs", "/run/trained": "trained", "/run/trained?tab=samples": "trained",
        "/run/trained?tab=config": "trained", "/run/trained?tab=logs": "trained", "/run/trained?tab=files": "trained",
        "/run/trained?tab=experts": "trained", "/run/drawn?tab=samples": "drawn", "/run/hung?tab=logs": "hung",
        f"/run/{LONG}": LONG, "/runs?q=" + "y" * 120: "0 of", "/runs?group=optim.lr": "Runs",
        "/run/failed": "failed", "/run/going?x=tokens&log=1": "going", "/compare": "Compare",
        "/compare?run=trained&run=long&x=time": "2 runs", "/run/nothing": None,
    }  # fmt: skip
    for path, title in shown.items():
        page.goto(path)
        if title:
            expect(page.locator("h1")).to_contain_text(title)
        else:
            expect(page.locator("main")).to_contain_text("There is no such run")
            assert [text for text in watched.wrong if "404" not in text] == []
            watched.wrong.clear()  # the browser itself tells the 404
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
    assert watched.wrong == []


def test_a_run_shows_what_its_record_says(page, trained):
    page.goto("/run/trained")
    last = [record for record in read_metrics(trained) if "loss" in record][-1]
    held = [record for record in read_metrics(trained) if "eval_loss" in record][-1]
    expect(page.locator(".numbers")).to_contain_text(f"{held['eval_loss']:.3f}")
    chart = page.locator(".big-chart .plot")
    expect(chart).to_have_attribute("aria-label", re.compile(r"loss by step: train .* at step 8.*held-out"))
    page.get_by_role("button", name="loss as a table", exact=True).click()
    table = page.locator("dialog table")
    expect(table.locator("tbody tr")).to_have_count(8)
    expect(table.locator("tbody tr").last).to_contain_text(f"{last['loss']:.4g}".rstrip("0"))
    page.keyboard.press("Escape")
    page.locator(".find-metric input").fill("/^grad_/")
    expect(page.locator(".grid .cell")).to_have_count(1)
    page.locator(".find-metric input").fill("no such metric")
    expect(page.locator("main")).to_contain_text("No metric of this run has")


def test_texts_stay_texts(page):
    page.goto("/runs")
    name = HOSTILE.replace("/", "")
    page.locator("#filter").fill("onerror")
    expect(rows(page)).to_have_count(1)
    assert names(page) == [name]
    rows(page).locator("a").click()
    expect(page.locator("h1")).to_have_text(name)
    page.goto("/run/trained?tab=logs")
    expect(page.locator(".log")).to_contain_text(HOSTILE)
    page.get_by_label("Find in the log").fill("onerror")
    expect(page.locator(".log mark")).to_have_text("onerror")
    page.goto("/run/going?tab=logs")
    expect(page.locator(".log")).to_contain_text("of attempt 2")
    page.get_by_label("Attempt").select_option("attempt 1")
    expect(page.locator(".log")).to_contain_text("of attempt 1")
    assert page.locator("main img").count() == 0
    assert page.title() != "1"


def test_pictures_and_tables_of_samples(page):
    page.goto("/run/drawn?tab=samples")
    expect(page.locator(".sample img")).to_have_count(2)
    image = page.get_by_alt_text("What the model made at step 2")
    page.wait_for_function("image => image.complete && image.naturalWidth === 17", arg=image.element_handle())
    assert image.bounding_box()["width"] == 16 * 17  # a small one is drawn larger
    expect(page.locator(".sample table")).to_contain_text(HOSTILE)
    expect(page.locator(".numbers")).to_contain_text("images/s64")
    page.get_by_role("button", name="Enlarge step 1").click()
    expect(page.locator("dialog img")).to_have_attribute("src", "/api/runs/drawn/samples/1.png")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.get_by_role("button", name="images", exact=True).click()
    expect(page.locator(".big-chart .plot")).to_have_attribute("aria-label", re.compile("at images 12"))
    expect(page.locator(".big-chart .unit")).to_have_text("by images")


def test_the_filter(page):
    page.goto("/runs")
    box = page.locator("#filter")
    box.fill("optim.lr >= 0.25 and not status = failed")
    expect(rows(page)).to_have_count(2)
    assert names(page) == ["dense-lr0.5-seed3", "dense-lr0.5-seed2"]
    assert "optim.lr" in page.url
    page.reload()
    expect(rows(page)).to_have_count(2)
    box.fill("metric:grad_norm > 4 or step > 1k")
    expect(rows(page)).to_have_count(2)
    for text, wrong, said in [
        ("nothing < 3", "nothing", "is no key"), ("loss <", " ", "a value should follow"),
        ("(loss < 3", "(", "not closed"),
        ('data = "x', '"x', "quote is not closed"), ("loss < 3) x", ")", "was not opened"),
    ]:  # fmt: skip
        box.fill(text)
        expect(page.locator(".wrong mark")).to_have_text(wrong.strip() or wrong, use_inner_text=False)
        expect(page.locator(".wrong")).to_contain_text(said)
        expect(box).to_have_attribute("aria-invalid", "true")
    box.fill("loss > 100")
    expect(page.locator("main")).to_contain_text("No run has loss > 100")
    page.get_by_role("button", name="Clear the filter").click()
    expect(page.locator("h1")).to_have_text("Runs 12")


@pytest.mark.slow
def test_sort_and_group(page):
    page.goto("/runs?q=dense")
    page.get_by_role("button", name="optim.lr").click()
    page.get_by_role("button", name="optim.lr").click()
    expect(page.locator('[data-key="optim.lr"]')).to_have_attribute("aria-sort", "descending")
    expect(rows(page).first).to_contain_text("dense-lr0.5")
    page.get_by_role("button", name="Group: sweep").click()
    page.get_by_label("Search: Group by").fill("optim.lr")
    page.locator("[popover] label", has_text="optim.lr").click()
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="Columns").click()
    page.get_by_label("Search: Columns").fill("grad_norm:last")
    page.locator("[popover] label").first.click()
    page.keyboard.press("Escape")
    # Seeds 2 and 3 have 4 and 5, 0 and 1 have 2 and 3.
    expect(rows(page).first).to_contain_text("4.5")
    expect(rows(page).last).to_contain_text("2.5")
    page.get_by_role("button", name="Runs of 0.5").click()
    expect(rows(page)).to_have_count(4)


@pytest.mark.slow
def test_views_are_addresses_with_names(page):
    page.goto("/runs?q=dense&columns=eval_loss+metric:loss:mean3&sort=-name&run=long")
    expect(rows(page)).to_have_count(4)
    expect(page.locator('[data-key="metric:loss:mean3"]')).to_contain_text("loss:mean3")
    page.get_by_role("button", name="Save or remove views").click()
    page.get_by_label("Name of the view").fill(HOSTILE)
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("button", name="All", exact=True).click()
    expect(page.locator("h1")).to_have_text("Runs 12")
    assert "run=long" in page.url
    view = page.locator(".views").get_by_role("button", name=HOSTILE)
    expect(view).to_have_attribute("aria-pressed", "false")
    view.click()
    expect(rows(page)).to_have_count(4)
    expect(view).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Columns 2").click()
    page.get_by_label("Records that a mean is of").fill("4")
    page.get_by_label("Search: Columns").fill("loss:mean4")
    page.locator("[popover] label", has_text="metric:loss:mean4").click()
    expect(page.locator('[data-key="metric:loss:mean4"]')).to_be_attached()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Save or remove views").click()
    page.get_by_role("button", name=f"Remove {HOSTILE}").click()
    expect(page.locator(".views .choice button")).to_have_count(1)


def test_keys_choose_runs_and_compare_them(page):
    page.goto("/runs?q=dense&sort=name")
    expect(rows(page)).to_have_count(4)
    for key in "jxjx":
        page.keyboard.press(key)
    expect(page.locator("main")).to_contain_text("2 selected")
    assert page.locator(".rows input:checked").count() == 2
    expect(page.locator(".peek h2").first).to_have_text("dense-lr0.001-seed1")
    page.keyboard.press(" ")
    expect(page.locator(".peek")).to_be_hidden()
    page.keyboard.press("c")
    expect(page.locator("h1")).to_contain_text("2 runs by steps.")
    page.keyboard.press("g")
    page.keyboard.press("n")
    expect(page.get_by_role("link", name=re.compile("^Now"))).to_have_attribute("aria-current", "page")
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_contain_text("select")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    page.keyboard.press("/")
    page.keyboard.type("long")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("long")


@pytest.mark.slow
def test_a_zoom_asks_for_finer_data(watched):
    page = watched.page
    page.goto("/run/long")
    over = page.locator(".big-chart .u-over")
    expect(over).to_be_visible()
    with page.expect_response(lambda answer: "/series" in answer.url and "from=" in answer.url) as answered:
        drag(page, over, 0.25, 0.5)
    x = answered.value.json()["metrics"]["loss"]["x"]
    # All of its own steps, where all 1,200 did not fit.
    assert x == list(range(int(x[0]), int(x[-1]) + 1))
    assert x[0] == pytest.approx(STEPS * 0.25, abs=STEPS * 0.02)
    assert x[-1] == pytest.approx(STEPS * 0.5, abs=STEPS * 0.02)
    assert "from=" in page.url
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "from=" not in url)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("low", "high"), [(1.35e-5, 0.0143), (0.7, 0.75), (1, 200), (3e-9, 5e9), (5e-324, 1e300), (2.5, 2.6), (9, 11)]
)
def test_a_logarithmic_axis_has_some_round_ticks(page, low, high):
    page.goto("/compare")
    code = "([low, high]) => import('/static/js/charts/chart.js').then((chart) => chart.logTicks(low, high))"
    ticks = page.evaluate(code, [low, high])
    assert 2 <= len(ticks) <= 9
    assert low <= min(ticks) < max(ticks) <= high
    assert ticks == sorted(ticks)


@pytest.mark.slow
def test_logarithmic_axes(page):
    page.goto("/run/trained?log=1")
    expect(page.get_by_role("button", name="log", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".grid .chart .plot").first).to_have_attribute("aria-label", re.compile("grad_norm by step"))
    page.get_by_role("button", name="log-log").click()
    expect(page.locator(".big-chart .plot")).to_have_attribute("aria-label", re.compile("loss by step"))
    page.keyboard.press("l")
    page.wait_for_url(lambda url: "log=x" in url and "xy" not in url)
    expect(page.get_by_role("button", name="log x")).to_have_attribute("aria-pressed", "true")
    page.goto("/run/trained?x=flops&log=x")
    expect(page.locator(".big-chart .plot")).to_have_attribute("aria-label", re.compile(r"train \S+ at flops \d\S*e\d"))
    page.goto("/compare?run=trained&run=long&log=xy")
    expect(page.locator(".compare .plot").first).to_have_attribute("aria-label", re.compile("long"))


def test_what_failed_is_asked_for_again(context, dashboard):
    context.request.post("/login", data={"token": TOKEN}, headers={"origin": f"http://{dashboard.host}"})
    page, refused = context.new_page(), []

    def refuse(route):
        refused.append(route.request.url)
        route.fulfill(status=503, json={"error": "the disk <b>does not answer</b>"})

    page.route("**/series?*", refuse)
    page.goto("/run/long")
    expect(page.locator(".run-two .notice")).to_contain_text("the disk <b>does not answer</b>")
    expect(page.locator(".grid .why").first).to_contain_text("tokens_per_second: the disk <b>does not answer</b>.")
    page.unroute("**/series?*")
    expect(page.locator(".big-chart .plot")).to_have_attribute("aria-label", re.compile("loss by step"))
    expect(page.locator(".grid .chart .plot").first).to_have_attribute("aria-label", re.compile("by step"))
    expect(page.locator(".grid .why")).to_have_count(0)
    expect(page.locator(".run-two .notice")).to_have_count(0)
    assert len(refused) >= 2


@pytest.mark.slow
def test_stacks_of_a_hang(page):
    page.goto("/run/hung?tab=logs")
    stacks = page.locator(".stack")
    expect(stacks).to_have_count(2)
    expect(stacks.first).to_contain_text("2 ranks")
    expect(stacks.first).to_contain_text("waits for others")
    expect(stacks.last).to_contain_text("1 rank")
    expect(stacks.last).to_contain_text(f"read_pages /a/{HOSTILE}.py:148")
    stacks.last.locator("summary").click()
    expect(stacks.last.locator("pre")).to_contain_text("/a/loop.py:20 in train")


def test_a_new_point_arrives_by_itself(page, root, dashboard):
    page.goto("/run/going")
    expect(page.locator(".numbers")).to_contain_text("of 40")
    record = Record(root / "going", 1)
    record.metrics({"step": 6, "loss": 0.123, "tokens": 48, "tokens_per_second": 100.0})
    record.close()
    expect(page.locator(".big-chart .plot")).to_have_attribute("aria-label", re.compile(r"0\.123 at step 6"))
    expect(page.locator(".numbers")).to_contain_text("6of 40")


def test_a_run_is_stopped_once_it_has_been_confirmed(page, root):
    page.goto("/run/going")
    expect(page.locator(".numbers")).to_contain_text("of 40")
    page.keyboard.press("s")
    dialog = page.locator("dialog")
    expect(dialog).to_contain_text("going after a checkpoint?")
    expect(dialog.get_by_role("button", name="Keep it running")).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    before = set(root.joinpath("going").iterdir())
    page.keyboard.press("s")
    page.locator("dialog").get_by_role("button", name="Stop after a checkpoint").click()
    expect(page.locator(".run-head .now")).to_contain_text("stopping")
    assert len(set(root.joinpath("going").iterdir()) - before) == 1


@pytest.mark.slow
def test_notes_and_tags_are_written(page, root):
    page.goto("/run/long")
    expect(page.locator("h1")).to_have_text("long")
    page.keyboard.press("n")
    page.get_by_label("Note", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".run-head .note")).to_have_text(HOSTILE)
    page.keyboard.press("t")
    page.get_by_label(re.compile("^Tags")).fill("kept\nfor=later")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".run-head .tag")).to_have_count(2)
    notes = read_notes(root / "long")
    assert (notes.note, notes.tags) == (HOSTILE, {"kept": "true", "for": "later"})
    page.goto("/runs")
    page.locator("#filter").fill("tag = for=later or tag = kept")
    expect(page.locator(".wrong, .table .rows")).not_to_have_count(0)
    page.locator("#filter").fill('tag = "kept"')
    expect(rows(page)).to_have_count(1)


@pytest.mark.slow
def test_light_and_dark(page):
    page.goto("/run/long")
    expect(page.locator("h1")).to_have_text("long")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(250, 250, 248)"
    page.keyboard.press("d")
    assert page.evaluate(ground) == "rgb(22, 24, 27)"
    page.reload()
    assert page.evaluate(ground) == "rgb(22, 24, 27)"


@pytest.mark.slow
def test_the_server_goes_and_the_page_keeps_what_it_knows(browser, root):
    with serving([root]) as server:
        server.look()
        context = browser.new_context(base_url=f"http://{server.host}")
        context.request.post("/login", data={"token": TOKEN}, headers={"origin": f"http://{server.host}"})
        page = context.new_page()
        page.goto("/runs")
        expect(page.locator(".live")).to_contain_text("live")
        expect(rows(page).first).to_be_visible()
        shown = names(page)
    expect(page.locator(".live")).to_contain_text("no answer", timeout=20_000)
    assert names(page) == shown
    context.close()


def test_names_and_roles(page):
    page.goto("/run/trained")
    expect(page.locator(".big-chart .plot")).to_have_attribute("aria-label", re.compile("loss by step"))
    for path in ("/", "/runs", "/run/trained", "/compare?run=trained&run=long"):
        page.goto(path)
        expect(page.locator("h1")).to_be_visible()
        nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, [role=img], a")]
            .filter((node) => node.checkVisibility() && !node.getAttribute("aria-label"))
            .filter((node) => !node.textContent.trim() && !node.labels?.length)
            .map((node) => node.outerHTML.slice(0, 200))""")
        assert nameless == []
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
        assert len(ids) == len(set(ids))

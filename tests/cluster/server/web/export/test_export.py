"""`muster dashboard --export`: HTML files that hold what the server would tell, and nothing that is not text."""

import base64
import hashlib
import json
import re
import stat
import time

import pytest
import torch
from dashboards import serving, write_run
from sweeps import begun, tiny_sweep, trained

from cluster.server.web.export.contents import opened
from cluster.server.web.export.page import write_pages
from cluster.sweep.train.progress import write_plan
from cluster.sweep.train.setting import Setting
from models.tasks.samples import ImageGrid
from trainer.observe.samples import write_sample
from trainer.record.lines import Record
from trainer.run.notes import Notes, write_notes

HOSTILE = "</script><script>alert(1)</script><!-- \u2028\u202e\x1b[31m \" ' & %s {told}"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def parts(path):
    """What the file is made of: its policy, styles, told JSON, scripts."""
    text = path.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    return policy, *(re.findall(rf"<{tag}>(.*?)</{tag.split()[0]}>", text, flags=re.DOTALL)
                     for tag in ("style", 'script type="application/json" id="told"', "script"))  # fmt: skip


def told(path):
    _, _, (content,), _ = parts(path)
    return json.loads(content)


def exported(tmp_path, *folders):
    written = []
    (tmp_path / "out").mkdir(exist_ok=True)
    write_pages(opened(folders), tmp_path / "out", written.append)
    return written


def test_it_tells_what_the_server_tells(root, tmp_path):
    drawn = write_run(root / "a", 6, of=6, lr=0.1, grad_norm=lambda step: None if step == 3 else 2.0 * step)
    write_sample(ImageGrid(torch.rand(4, 1, 5, 5)), drawn / "samples" / "step-00000004")
    (drawn / "logs").mkdir()
    (drawn / "logs" / "attempt-01-rank-0000.log").write_text("first\nlast\n")
    write_run(root / "b", 4, of=6, lr=0.2)
    one, _, both = exported(tmp_path, root / "a", root / "b")
    found, compared = told(one), told(both)
    with serving([root]) as dashboard:
        dashboard.look()
        details = dashboard.get("/api/runs/a").json
        own = found["each"]["a"]
        (sample,) = own["details"]["samples"]
        picture = dashboard.get("/api/runs/a/samples/4.png").body
        assert base64.b64decode(sample.pop("data").removeprefix("data:image/png;base64,")) == picture
        differ = {key for key in details if own["details"][key] != details[key]}
        assert differ <= {"row"}
        for name in ("loss", "eval_loss", "grad_norm"):
            line = dashboard.get(f"/api/runs/a/series?metric={name}").json["metrics"][name]
            assert own["series"][name] == {key: line[key] for key in ("x", "y", "infinite")}
        for axis in ("tokens", "time"):
            line = dashboard.get(f"/api/runs/a/series?metric=loss&x={axis}").json["metrics"]["loss"]
            assert own["axes"][axis] == line["x"]
        assert own["logs"]["0"] == dashboard.get("/api/runs/a/log").json
        comparison = dashboard.get("/api/compare?run=a&run=b").json
        assert compared["differs"] == comparison["differs"]
        for id, line in comparison["runs"].items():
            assert compared["each"][id]["series"]["loss"] == {key: line[key] for key in ("x", "y", "infinite")}
    assert compared["files"] == {"a": "run-a.html", "b": "run-b.html"}
    assert stat.S_IMODE(one.stat().st_mode) == 0o600


def test_its_policy_lets_run_what_is_its_own_and_nothing_else(root, tmp_path):
    (path,) = exported(tmp_path, write_run(root / "a"))
    policy, (style,), _, (script,) = parts(path)

    def digest(text):
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert (rules["script-src"], rules["style-src"]) == (digest(script), digest(style))
    assert not {"connect-src", "frame-src", "object-src"} & rules.keys()
    assert "http" not in "".join(rules.values())
    assert re.findall(r"""(?:src|href)=["'](?!data:)[^"']*""", path.read_text()) == []


def test_texts_of_strangers_stay_texts(root, tmp_path):
    run = write_run(root / HOSTILE.replace("/", "").replace("\x1b", ""), 2)
    record = Record(run, 2)
    record.event("failure", reason=HOSTILE, traceback=HOSTILE, step=2)
    record.metrics({"step": 3, "loss": 1.0, "tokens": 9, HOSTILE: 1.0, "__proto__": 2.0})
    record.close()
    write_notes(run, Notes(HOSTILE, {"project": HOSTILE}))
    for folder, name in (("samples", "step-1.txt"), ("samples", "step-2.csv"), ("logs", "attempt-01-rank-0000.log")):
        (run / folder).mkdir(exist_ok=True)
        (run / folder / name).write_text(HOSTILE)
    paths = exported(tmp_path, run, write_run(root / "b"))
    assert len(paths) == 3
    for path in paths:
        assert re.fullmatch(r"[\w.-]+\.html", path.name)
        text = path.read_text(encoding="utf-8")
        assert text.count("<script") == text.count("</script") == 2
        assert "<!--" not in text
        _, _, (content,), _ = parts(path)
        assert content.isascii()
        assert re.findall("[\u202e\x1b]", text) == []
    own = next(iter(told(paths[0])["each"].values()))
    assert "alert(1)" in own["details"]["row"]["note"]
    assert own["details"]["samples"][0]["text"].startswith("</script><script>alert(1)")
    title = re.search("<title>(.*?)</title>", paths[0].read_text())[1]
    assert "&lt;script&gt;" in title


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "config.yaml"])
@pytest.mark.parametrize("content", [b"", b"{", bytes(range(256))])
def test_what_is_broken_is_written_as_far_as_it_goes(root, tmp_path, name, content):
    run = write_run(root / "run")
    (run / name).write_bytes(content)
    paths = exported(tmp_path, run, write_run(root / "sound"))
    assert told(paths[-1])["each"]["sound"]["series"]["loss"]["x"] == [1, 2, 3, 4]


def test_names_that_are_alike_get_files_of_their_own(root, tmp_path):
    names = [
        exported.name for exported in exported(tmp_path, *(write_run(root / name) for name in ("a b", "a_b", "A_b")))
    ]
    assert names == ["run-a_b.html", "run-a_b-2.html", "run-A_b-3.html", "compare.html"]


def test_a_sweep(root, tmp_path, tiny_data, muster):
    sweep = tiny_sweep(root, tiny_data, grid={}, axes={"optim.lr": [0.001, 0.002, 0.003]})
    setting, record = Setting(sweep), begun(sweep)
    planned = setting.plan()
    setting.write_sweep()
    write_plan(setting.sweep_dir, planned)
    for trial, loss in zip(planned.trials[:2], (2.0, 1.5), strict=True):
        trained(setting, trial, record, loss=loss)
    out = tmp_path / "out"
    code, said, err = muster("dashboard", "--root", str(root), "--export", str(out), sweep.name)
    (path,) = out.iterdir()
    assert (code, said, err) == (0, f"{path}\n", "")
    found = told(path)
    with serving([root]) as dashboard:
        dashboard.look()
        status = dashboard.get(f"/api/sweeps/{sweep.name}").json
        assert found["sweep"] | {"eta": 0.0} == status | {"eta": 0.0}  # which is from now on
        assert found["sweeps"] == dashboard.get("/api/sweeps").json["sweeps"]
        until = time.monotonic() + 300
        while (law := dashboard.get(f"/api/sweeps/{sweep.name}/law").json)["working"]:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert found["law"]["law"] | {"time": 0} == law["law"] | {"time": 0}  # of a sweep that has not ended: until now
    assert [trial["eval_loss"] for trial in found["sweep"]["trials"]] == [2.0, 1.5, None]


def test_the_command(root, tmp_path, muster):
    for name in ("a", "b"):
        write_run(root / name)
    out = tmp_path / "new" / "out"
    code, said, err = muster("dashboard", "--root", str(root), "--export", str(out), "b")
    assert (code, said, err) == (0, f"{out}/run-b.html\n", "")
    code, said, err = muster("dashboard", "--root", str(root), "--export", str(out))
    assert [path.name for path in sorted(out.iterdir())] == ["compare.html", "run-a.html", "run-b.html"]
    assert code == 0


def test_mistakes(root, tmp_path, muster):
    write_run(root / "quick")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["--root", str(root), "--export", str(tmp_path / "out"), "quack"], "no run 'quack' in "),
        (["--root", str(root), "--export", str(tmp_path / "file"), "quick"], "it cannot be written (File exists)"),
        (["--root", str(tmp_path / "empty"), "--export", str(tmp_path / "out")], "there are no runs in"),
        (["--root", str(root), "quick"], "name a folder with --export DIR"),
    ]:
        code, out, err = muster("dashboard", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert len(err.splitlines()) <= 3
    assert not (tmp_path / "out").exists()
    for number in range(21):
        write_run(root / f"run-{number}", 1)
    code, _, err = muster("dashboard", "--root", str(root), "--export", str(tmp_path / "out"))
    assert code == 2
    assert "there are 22 runs, and a page compares at most 20" in err

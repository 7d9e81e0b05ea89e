"""A terminal is sent no control character that came from a name, a reason, a text or a log; files and pipes are."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.record.lines import Record
from trainer.record.terminal import visible

ROOT = Path(__file__).parents[2]
EVIL = "a\x1b]52;c;aGVsbG8=\x07b\x1b[8m\x1b[2Jc\x9b31md\u202ee\x7ff\rg\bh"
SHOWN = r"a\x1b]52;c;aGVsbG8=\x07b\x1b[8m\x1b[2Jc\x9b31md\u202ee\x7ff\rg\x08h"
NAME = "evil\x1b]0;title\x07[red]\x9b2J"
OWN = re.compile("\x1b\\[[0-9;]*m|\x1b\\[[0-9]*[AK]|\x1b\\[2K|\x1b\\[\\?25[lh]|\r\n|\r")
"""What rich writes: styles, the cursor up, a line erased, the cursor hidden and shown; and what a terminal makes of a
line feed."""


def on_a_terminal(command: list[str], folder: Path, **more: str) -> tuple[int, str]:
    """Returns (exit code, what the terminal was sent)."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "300"} | more
    process = subprocess.Popen(
        [sys.executable, "-P", *command], cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:  # the last writer has closed it
            break
        if not read:
            break
        sent += read
    os.close(ours)
    return process.wait(60), sent.decode(errors="surrogateescape")


def muster(folder: Path, *arguments: str) -> tuple[int, str]:
    return on_a_terminal(["-m", "cluster.cli", *arguments], folder)


def controls(sent: str) -> list[str]:
    """Control characters that are none of rich's own."""
    return [
        each for each in OWN.sub("", sent) if unicodedata.category(each) in ("Cc", "Cf", "Cs") and each not in "\n\t"
    ]


@pytest.fixture
def run(tmp_path):
    """A run whose name and record hold what a terminal would obey."""
    run_dir = tmp_path / "runs" / NAME
    record = Record(run_dir, 1)
    (run_dir / "config.yaml").write_text("{}")
    record.event("attempt_started", world_size=1, device=EVIL)
    record.metrics({"step": 1, "loss": 1.0, "tokens": 1, "step_time": 1.0})
    record.event("policy", action="stop", reason=EVIL, failures=1)
    record.event("attempt_ended", status="FAILED", reason=EVIL, step=1)
    record.close()
    (run_dir / "tracking.json").write_text(json.dumps({"error": EVIL}))
    checkpoint = run_dir / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    return run_dir


PLAN = {
    "vocab_size": 1, "open": 0, "warnings": [EVIL],
    "trials": [{"name": "a", "variant": "[red]" + EVIL, "budget": 1.0, "flops": 1.0, "spent": 1.0, "tokens": 1,
                "steps": 1, "from_step": 0, "after": None, "parameters": {}}],
}  # fmt: skip


def test_runs_and_status(run, tmp_path):
    code, sent = muster(tmp_path, "runs")
    assert code == 0, sent
    assert controls(sent) == []
    assert r"evil\x1b]0;title[red]\x9b2J" in sent
    code, sent = muster(tmp_path, "status", NAME)
    assert code == 0, sent
    assert controls(sent) == []
    assert sent.count("]52;c;aGVsbG8=") >= 2, "the reason, and the tracker's error"
    assert SHOWN.partition("\\r")[0] in sent, "reasons are told with single spaces"


def test_pipes_get_what_is_there(run, tmp_path):
    command = [sys.executable, "-P", "-m", "cluster.cli", "status", NAME]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert b"\x1b]52;c;aGVsbG8=\x07b" in done.stdout


MISTAKES = [
    ["train", "quickstart", f"optim.{EVIL}=1"],
    ["train", "quickstart", f"optim.name={EVIL}"],
    ["train", EVIL],
    ["status", EVIL],
    ["config", "{evil.yaml}"],
    ["sweep", "plan", "{evil.yaml}"],
    ["checkpoint", "list", NAME],
    ["checkpoint", "show", NAME],
    ["data", "inspect", EVIL],
    ["train", "--" + EVIL],
]


@pytest.mark.few(4)
@pytest.mark.parametrize("command", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes(run, tmp_path, command):
    (tmp_path / "evil.yaml").write_text(json.dumps({EVIL: 1, "name": EVIL}))
    code, sent = muster(tmp_path, *(each.replace("{evil.yaml}", "evil.yaml") for each in command))
    assert controls(sent) == []
    assert sent
    assert code in (0, 2), sent


@pytest.mark.slow
def test_a_name_that_is_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "runs") + b"/caf\xe9\x9b31m"
    os.makedirs(folder)
    with open(folder + b"/config.yaml", "w") as file:
        file.write("{}")
    for locale in ("C.UTF-8", "C"):
        code, sent = on_a_terminal(["-m", "cluster.cli", "runs"], tmp_path, LC_ALL=locale)
        assert (code, controls(sent)) == (0, [])
        assert r"caf\udce9\udc9b31m" in sent
    command = [sys.executable, "-P", "-m", "cluster.cli", "runs"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_sweep(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    code = "import sys; from pathlib import Path; from trainer.record.terminal import guard; guard()\n"
    code += "from cluster.sweep.train.display import show; show(Path(sys.argv[1]))"
    status, sent = on_a_terminal(["-c", code, str(folder)], tmp_path)
    assert status == 0, sent
    assert controls(sent) == []
    assert "[red]a" in sent


LIVE = """
import json, sys
from trainer.record.progress import ProgressView
from trainer.record.terminal import guard
guard()
evil = json.loads(sys.argv[1])
view = ProgressView(10)
view.start()
view.metrics({"step": 1, "time": 0.0, "loss": 1.0, "step_time": 1.0, "tokens_per_second": 1.0})
view.event({"event": "attempt_started", "attempt": 1, "time": 0.0, "device": evil})
view.event({"event": "attempt_ended", "attempt": 1, "time": 0.0, "status": "FAILED", "reason": "[/] [bold] " + evil})
view.event({"event": evil, "attempt": 1, "time": 0.0, evil: evil})
print(evil)
print(evil, file=sys.stderr)
view.refresh()
view.stop()
"""


def test_progress_that_is_drawn_again_and_again(tmp_path):
    code, sent = on_a_terminal(["-c", LIVE, json.dumps(EVIL)], tmp_path)
    assert code == 0, sent
    assert controls(sent) == []
    assert "\x1b[2K" in sent, "the line itself is drawn"
    assert "[/] [bold] a" in sent
    assert sent.count("c;aGVsbG8=") >= 4


CODES = {
    "print": "print(evil)",
    "standard error": "print(evil, file=sys.stderr)",
    "in parts": "[print(each, end='', flush=True) for each in evil]",
    "lines": "sys.stdout.writelines([evil, evil])",
    "warning": "import warnings; warnings.warn(evil)",
    "logging": "import logging; logging.error(evil)",
    "traceback": "raise ValueError(evil)",
    "exit": "sys.exit(evil)",
    "console": "from trainer.record.terminal import Console; Console().print(evil, style='bold')",
    "console on standard error": "from trainer.record.terminal import Console; Console(stderr=True).print(evil)",
    "another console": "from rich.console import Console; Console(highlight=False).print(evil)",
    "click": "import click; click.echo(evil); click.secho(evil, fg='red')",
}


@pytest.mark.few(5)
@pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
def test_every_way_to_a_terminal(tmp_path, code):
    start = (
        "import json, sys; from trainer.record.terminal import guard; guard(); guard(); evil = json.loads(sys.argv[1]);"
    )
    _, sent = on_a_terminal(["-c", f"{start}{code}", json.dumps(EVIL)], tmp_path)
    assert controls(sent) == []
    assert "52;c;aGVsbG8=" in sent


def test_what_becomes_a_file_is_kept_as_it_is(tmp_path):
    """As the output of a process is, from the middle of its life on."""
    code = """if True:
        import json, os, sys
        from trainer.record.terminal import guard
        guard()
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT), 1)
        print(json.loads(sys.argv[1]))"""
    on_a_terminal(["-c", code, json.dumps(EVIL)], tmp_path)
    assert (tmp_path / "log").read_bytes().decode() == EVIL + "\n"


def test_nobody_listens(tmp_path):
    code = "from trainer.record.terminal import guard; guard(); print('words')"
    command = ["sh", "-c", f'exec "{sys.executable}" -P -c "{code}" >&- 2>&-']
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_torchrun_tells_a_mistake(tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    code, sent = on_a_terminal(["-m", "trainer", "quickstart", f"optim.{EVIL}=1"], tmp_path, **environment)
    assert (code, controls(sent)) == (2, [])
    assert "muster: optim.a" in sent


def test_only_our_console_is_used():
    """Rich's own reads markup in names, and writes what they hold."""
    found = []
    for path in [path for package in ("trainer", "cluster") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console"):
                found += [f"{path.name}: {each.name}" for each in node.names if each.name in ("Console", "print")]
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_markup"):
                found.append(f"{path.name}: from_markup")
    assert found == []


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(codec=None)))
def test_visible(text):
    shown = visible(text)
    assert not [each for each in shown if unicodedata.category(each) in ("Cc", "Cs") and each not in "\n\t"]
    assert visible(shown) == shown
    if not [each for each in text if unicodedata.category(each) in ("Cc", "Cs", "Cf")]:
        assert shown == text

"""Where ranks stood, as their watchdogs save it and as strangers may write it."""

import faulthandler
import json
import os
import threading

import pytest
from dashboards import serving, write_run

from cluster.server.web.pages.stacks import MOST_FRAMES
from trainer.record.lines import Record


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_each_rank_says_where_it_stood(root):
    run = write_run(root / "run", 3, status=None)
    (run / "stacks").mkdir()
    head = {"rank": 0, "host": "here", "step": 4, "phase": "step", "thread": f"0x{threading.get_ident():016x}"}
    with open(run / "stacks" / "attempt-02-rank-0000.txt", "w", buffering=1) as file:
        file.write(f"{json.dumps(head)}\n")
        faulthandler.dump_traceback(file)
    (run / "stacks" / "attempt-02-rank-0001.txt").write_text("Timeout (0:00:10)!\n")
    (run / "stacks" / "attempt-02-rank-0002.txt").write_text("")
    (run / "stacks" / "attempt-01-rank-0000.txt").write_text("of another attempt")
    record = Record(run, 2)
    record.event("hang", reason="no progress\x1b[31m", suspects=[1], stacks=[])
    record.close()
    with serving([root]) as dashboard:
        dashboard.look()
        told = dashboard.get("/api/runs/run/stacks").json
    assert (told["attempt"], told["reason"]) == (2, "no progress\\x1b[31m")
    first, second = told["ranks"]
    assert (first["rank"], first["host"], first["step"], first["phase"]) == (0, "here", 4, "step")
    assert first["frames"][0].endswith("in test_each_rank_says_where_it_stood")
    assert len(first["frames"]) > 3
    assert (second["rank"], second["frames"], second["suspect"], first["suspect"]) == (1, [], True, False)


def test_a_run_without_stacks_says_so(root):
    write_run(root / "run")
    with serving([root]) as dashboard:
        dashboard.look()
        assert dashboard.get("/api/runs/run/stacks").json == {
            "attempt": None,
            "reason": None,
            "time": None,
            "ranks": [],
        }


HEADS = [
    "{",
    "[]",
    "3",
    '{"thread": 3}',
    '{"thread": "x", "step": {}, "phase": []}',
    '{"thread": "x", "step": 1e99, "phase": "\\u001b"}',
]


@pytest.mark.parametrize("head", HEADS)
def test_files_of_strangers(root, tmp_path, head):
    run = write_run(root / "run")
    (run / "stacks").mkdir()
    (tmp_path / "secret").write_text("a secret")
    lines = [f'  File "/a/{n}\x1b[0m.py", line 1 in <script>' for n in range(500)]
    (run / "stacks" / "attempt-1-rank-0.txt").write_text("\n".join([head, "Thread x:", *lines]))
    (run / "stacks" / "attempt-1-rank-1.txt").symlink_to(tmp_path / "secret")
    os.mkfifo(run / "stacks" / "attempt-1-rank-2.txt")
    with serving([root]) as dashboard:
        dashboard.look()
        answer = dashboard.get("/api/runs/run/stacks")
    assert answer.status == 200
    (rank,) = answer.json["ranks"]
    assert len(rank["frames"]) <= MOST_FRAMES
    assert "\x1b" not in str(answer.json)
    assert rank["frames"] == [] or rank["frames"][0] == "/a/0\\x1b[0m.py:1 in <script>"

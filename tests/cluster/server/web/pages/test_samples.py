"""Samples as the dashboard tells them: those that training writes, and strangers' files."""

import csv
import io
import os
import struct
import zlib

import pytest
import torch
from dashboards import serving, write_run
from PIL import Image

from cluster.server.web.pages.samples import MOST_PICTURE, MOST_ROWS
from models.tasks.samples import ImageGrid, Table, Text
from trainer.observe.samples import write_sample


@pytest.fixture
def root(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_they_are_what_training_wrote(root):
    run = write_run(root / "run")
    images = torch.linspace(0, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
    file = write_sample(ImageGrid(images), run / "samples" / "step-00000002")
    write_sample(Text("def f():\n\treturn 1"), run / "samples" / "step-00000001")
    write_sample(Table(["label", "score"], [["a, b", 0.25], ["c", 1.0]]), run / "samples" / "step-00000003")
    with serving([root]) as dashboard:
        dashboard.look()
        text, picture, table = dashboard.get("/api/runs/run").json["samples"]
        assert text == {"step": 1, "kind": "text", "text": "def f():\n\treturn 1"}
        width, height = Image.open(file).size
        assert picture == {"step": 2, "kind": "picture", "width": width, "height": height}
        rows = [["a, b", "0.25"], ["c", "1.0"]]
        assert table == {"step": 3, "kind": "table", "columns": ["label", "score"], "rows": rows, "more": False}
        answer = dashboard.get("/api/runs/run/samples/2.png")
        assert (answer.status, answer.body) == (200, file.read_bytes())
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert dashboard.ask("GET", "/api/runs/run/samples/2.png").status == 401


def png(width: int, height: int, more: bytes = b"") -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + more


def test_what_is_no_picture_is_not_sent(tmp_path, root):
    run = write_run(root / "run")
    folder = run / "samples"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(1, 1, b"a secret"))
    (folder / "step-1.png").write_text("<script>alert(1)</script>")
    (folder / "step-2.png").write_bytes(png(1 << 16, 1 << 16))  # a bomb
    (folder / "step-3.png").write_bytes(png(9, 9, bytes(MOST_PICTURE)))
    (folder / "step-4.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "step-5.png")
    (folder / "step-6.svg").write_text("<svg onload='alert(1)'/>")
    (folder / "step-7.png").write_bytes(png(9, 9))
    with serving([root]) as dashboard:
        dashboard.look()
        told = dashboard.get("/api/runs/run").json["samples"]
        assert {each["step"]: "wrong" in each for each in told} == {1: True, 2: True, 3: True, 7: False}
        for step in ("1", "2", "3", "4", "5", "6", "8", "..%2f7", "7%00", "9" * 30, "x"):
            answer = dashboard.get(f"/api/runs/run/samples/{step}.png")
            assert answer.status in (400, 404), step
            assert answer.headers["content-type"] == "application/json"
            assert b"secret" not in answer.body
        assert dashboard.get("/api/runs/run/samples/7.png").status == 200
        assert dashboard.get("/api/runs/run/samples/7.svg").status == 404
        (folder / "step-7.png").unlink()
        assert dashboard.get("/api/runs/run/samples/7.png").status == 404


def test_a_table_is_bounded_and_without_control_characters(root):
    before = csv.field_size_limit(1 << 17)  # of the whole process: some libraries raise it
    run = write_run(root / "run")
    (run / "samples").mkdir()
    text = io.StringIO()
    csv.writer(text).writerows([["a", "\x1b[31mred"], *([str(n), "x" * 9000] for n in range(MOST_ROWS + 50))])
    (run / "samples" / "step-1.csv").write_text(text.getvalue())
    (run / "samples" / "step-2.csv").write_bytes(b'"' + b"y" * 300_000)
    (run / "samples" / "step-3.csv").write_bytes(b"")
    with serving([root]) as dashboard:
        dashboard.look()
        first, broken, empty = dashboard.get("/api/runs/run").json["samples"]
        assert first["columns"] == ["a", "\\x1b[31mred"]
        assert first["more"]
        assert first["rows"] == [[str(n), "x" * 500] for n in range(len(first["rows"]))]
        assert 100 < len(first["rows"]) <= MOST_ROWS
        assert "field larger" in broken["wrong"]
        assert (empty["columns"], empty["rows"], empty["more"]) == ([], [], False)
    csv.field_size_limit(before)

"""What is measured on a GPU runs in miniature on a CPU: no part fails, every check holds, the tables are written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> str:
    """What the script prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def holds(out: Path, *arguments: str) -> None:
    names = [line.split()[0] for line in run("--list", *arguments).splitlines()]
    run("--dry", "--minutes", "30", "--out", str(out), *arguments)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    finished = [row["part"] for row in rows if "seconds" in row and len(row) == 3]
    assert sorted(finished) == sorted(names)
    assert not [row for row in rows if "failed" in row or row.get("skipped") == "no time left"]
    checks = [row for row in rows if "ok" in row]
    assert checks
    assert all(row["ok"] is True for row in checks)
    told = {row["part"] for row in rows} - {"surroundings"}
    tables = (out / "tables.md").read_text()
    assert all(f"## {name}\n" in tables for name in names)
    assert told == set(names)


@pytest.mark.slow
def test_every_part(tmp_path):
    holds(tmp_path / "out")

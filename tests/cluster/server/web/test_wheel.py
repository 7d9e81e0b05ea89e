"""What the pages consist of is in the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from cluster.server.web.static_files import STATIC

ROOT = Path(__file__).parents[4]


def test_every_static_file_is_in_the_wheel(tmp_path):
    """Built from a copy, by the setuptools that is installed, without a network."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "cluster", source / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    built = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    with zipfile.ZipFile(tmp_path / built.stdout.splitlines()[-1]) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("cluster/server/web/static/")}
    files = {path.relative_to(ROOT).as_posix() for path in STATIC.rglob("*") if path.is_file()}
    assert len(files) > 30
    assert names == files

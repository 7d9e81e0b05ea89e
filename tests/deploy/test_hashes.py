"""deploy/hashes pins what constraints.txt pins, all that is needed, each with digests, and names no index."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = {path.name: path for path in sorted((DEPLOY / "hashes").iterdir())}
PIN = re.compile(r"([a-z0-9-]+)==(\S+?)(?: ; (.+?))?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", name)[0]).lower()


def hashed(name: str) -> dict[str, str]:
    """{package: version}; every line of the file belongs to a pin with digests."""
    text = FILES[name].read_text()
    assert PIN.sub("", text) == ""
    found = [(match[1], match[2]) for match in PIN.finditer(text)]
    assert len(dict(found)) == len(found)
    return dict(found)


def constraints() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {plain(name): version for name, version in pins}


def test_the_files_are_those_that_the_images_and_make_install():
    used = [(DEPLOY / "docker" / name).read_text() for name in ("Dockerfile", "mlflow.Dockerfile")]
    used.append((ROOT / "Makefile").read_text())
    named = set(re.findall(r"--require-hashes -r \S*?([\w-]+\.txt)", "\n".join(used)))
    assert named == set(FILES) == {"muster.txt", "muster-cpu.txt", "mlflow.txt"}


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_constraints(name):
    """`python deploy/lock.py` makes them so again."""
    pinned, found = constraints(), hashed(name)
    assert {package: version for package, version in found.items() if pinned.get(package, version) != version} == {}
    assert len(found.keys() & pinned.keys()) > 60


def test_all_that_is_needed_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {plain(requirement) for requirement in project["dependencies"]}
    whole, cpu = hashed("muster.txt"), hashed("muster-cpu.txt")
    assert needed <= whole.keys()
    # A CPU build of torch brings none of CUDA along, and is none of PyPI's files.
    left_out = whole.keys() - cpu.keys()
    assert {"torch", "triton"} <= left_out
    assert all(re.fullmatch(r"torch|triton|nvidia-.*|cuda-.*", package) for package in left_out)
    assert cpu.items() <= whole.items()
    lines = (DEPLOY / "mlflow" / "requirements.txt").read_text().splitlines()
    asked = dict([*line.split("=="), constraints()["mlflow"]][:2] for line in lines if not line.startswith("#"))
    assert asked.items() <= hashed("mlflow.txt").items()


def test_nothing_for_developers_is_in_the_images():
    tools = {"pytest", "ruff", "mypy", "hypothesis", "transformers", "torchao"}
    assert all(tools.isdisjoint(hashed(name)) for name in FILES)


def test_after_a_hashed_install_make_train_installs_nothing(tmp_path):
    """With a Python that only says what it was asked for."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "constraints.txt", tmp_path / "deploy")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for program in (tmp_path / "python", programs / "pip", programs / "muster"):
        program.write_text(f"#!/bin/sh\necho {program.name} $*\n")
        program.chmod(0o700)
    asked = [
        subprocess.run(["make", "-s", f"PYTHON={tmp_path}/python", goal], cwd=tmp_path, capture_output=True, text=True)
        for goal in ("install-hashed", "train")
    ]
    assert "--require-hashes" in asked[0].stdout
    assert asked[1].stdout.splitlines() == ["muster train quickstart"]

"""The manifests and compose file of deploy/ as trees, and the commands in them."""

import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from cluster.cli import app

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
POD_LISTS = ("containers", "initContainers")
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|MINIO_ROOT")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


SOURCES = {path.relative_to(KUBERNETES).as_posix(): documents(path) for path in sorted(KUBERNETES.rglob("*.yaml"))}
OBJECTS = {
    (document["kind"], document["metadata"]["name"]): document
    for name, found in SOURCES.items()
    if not name.endswith("kustomization.yaml")
    for document in found
}
CLUSTER = OBJECTS["RayCluster", "muster"]["spec"]
HEAD, WORKERS = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"][0]


def walk(tree: Any) -> list[dict]:
    """Every mapping of a tree."""
    if isinstance(tree, list):
        return [found for each in tree for found in walk(each)]
    return [tree, *(found for each in tree.values() for found in walk(each))] if isinstance(tree, dict) else []


def pods(tree: Any) -> list[dict]:
    """Every pod's spec."""
    return [found for found in walk(tree) if isinstance(found.get("containers"), list)]


def containers(tree: Any) -> list[dict]:
    return [each for pod in pods(tree) for key in POD_LISTS for each in pod.get(key, [])]


def muster_command(line: str) -> dict[str, Any]:
    """Parse `muster ...` as the command line does. Returns its parameters."""
    program, *arguments = shlex.split(line.removeprefix("exec "), comments=True)
    assert program == "muster"
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    return command.make_context(command.name, arguments).params


def options(command: Any) -> set[str]:
    return {option for each in command.params for option in each.opts if option.startswith("--")}


@cache
def ray_commands() -> dict[str, Any]:
    from ray.scripts import scripts

    return scripts.cli.commands


@cache
def mlflow_server() -> Any:
    from mlflow.cli import server

    return server


def pins() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@cache
def built(overlay: Path) -> list[dict]:
    """The manifests that an overlay builds."""
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if not (kubectl or kustomize):
        pytest.skip("neither kubectl nor kustomize is installed")
    command = [kustomize, "build"] if kustomize else [kubectl, "kustomize"]
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())

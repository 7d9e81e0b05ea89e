"""MLflow in Kubernetes and in compose: its keys, its store and its options."""

import re
import shlex
import subprocess
from typing import Any

import pytest
from manifests import CLUSTER, COMPOSE, OBJECTS, ROOT, containers, mlflow_server, pods

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside Ray and MLflow


def store_commands() -> list[tuple[str, dict[str, Any]]]:
    """What makes MLflow's bucket and user, and its environment, in Kubernetes and in compose."""
    (pod,) = pods(OBJECTS["Deployment", "mlflow"])
    (container,) = pod["initContainers"]
    service = COMPOSE["services"]["store"]
    assert container["command"][:2] == service["entrypoint"] == ["sh", "-ceu"]
    return [
        (container["command"][2], {each["name"]: each for each in container["env"]}),
        (service["command"][0].replace("$$", "$"), service["environment"]),
    ]


def test_mlflow_has_keys_of_its_own():
    """MinIO's root goes to MinIO and to what makes MLflow's user; both places do so by the same commands."""
    (in_kubernetes, here), (in_compose, there) = store_commands()
    assert in_kubernetes == in_compose
    assert here.keys() == there.keys()
    assert subprocess.run(["sh", "-n", "-c", in_kubernetes]).returncode == 0
    assert set(re.findall(r"\$(\w+)", in_kubernetes)) | {"MC_CONFIG_DIR"} == here.keys()
    for _, environment in mlflow_commands():
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} < environment.keys()
        assert not any(name.startswith("MINIO_") for name in environment)
    roots = [each for each in containers(list(OBJECTS.values())) if "muster-minio" in str(each)]
    assert sorted(each["name"] for each in roots) == ["minio", "store"]
    with_roots = [name for name, each in COMPOSE["services"].items() if "MINIO_ROOT_USER" in each["environment"]]
    assert with_roots == ["store", "minio"]


def test_the_commands_of_the_store_run_through_and_again(tmp_path):
    """With a stand-in for `mc` that takes what it was told, as the real one refuses to attach a policy twice."""
    (tmp_path / "mc").write_text(
        '#!/bin/sh\necho "mc $*" >> "$LOG"\n'
        'case "$*" in "alias set"*|"admin user add"*) while read line; do echo "in: $line" >> "$LOG"; done;;\n'
        '"admin policy detach"*) rm "$LOG.attached" || exit 1;;\n'
        '"admin policy attach"*) [ ! -e "$LOG.attached" ] || exit 1; touch "$LOG.attached";;\nesac\n'
    )
    (tmp_path / "mc").chmod(0o755)
    keys = {"MINIO_ROOT_USER": "root", "MINIO_ROOT_PASSWORD": "root/pass word", "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "sec:ret"}  # fmt: skip
    text, log = store_commands()[0][0], tmp_path / "log"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), **keys}
    for _ in range(2):
        log.unlink(missing_ok=True)
        subprocess.run(["sh", "-ceu", text], env=environment, check=True, timeout=60, stderr=subprocess.DEVNULL)
        assert log.read_text().splitlines() == [
            "mc alias set store http://minio:9000", "in: root", "in: root/pass word",
            "mc mb --ignore-existing store/mlflow",
            "mc admin policy create store mlflow /etc/muster/policy.json",
            "mc admin user add store", "in: key", "in: sec:ret",
            "mc admin policy detach store mlflow --user key", "mc admin policy attach store mlflow --user key",
        ]  # fmt: skip


def mlflow_commands() -> list[tuple[list[str], dict[str, str]]]:
    """The server's arguments, and its environment, where Kubernetes and compose start it."""
    (pod,) = pods(OBJECTS["Deployment", "mlflow"])
    (container,) = pod["containers"]
    assert container["command"] == ["mlflow", "server"]
    service = COMPOSE["services"]["mlflow"]
    assert service["command"][:2] == ["mlflow", "server"]
    return [
        (container["args"], {each["name"]: each.get("value", "") for each in container["env"]}),
        (service["command"][2:], service["environment"]),
    ]


@pytest.mark.parametrize("where", [0, 1], ids=["kubernetes", "compose"])
def test_mlflow_knows_its_options(where):
    arguments, environment = mlflow_commands()[where]
    given = mlflow_server().make_context("server", list(arguments)).params
    assert given["serve_artifacts"] is True
    assert given["artifacts_destination"] == "s3://mlflow"
    assert "--default-artifact-root" not in " ".join(arguments)  # runs would write to the store themselves
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg2://")


def test_readmes_own_server_runs_nothing_for_others():
    readme = (ROOT / "trainer" / "README.md").read_text()
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "mlflow server" in text]
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in block
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in block
    words = shlex.split(block)
    given = mlflow_server().make_context("server", words[words.index("server") + 1 :]).params
    assert given["host"] in (None, "127.0.0.1")


def test_mlflow_knows_its_variables():
    import mlflow.environment_variables

    known = {*dir(mlflow.environment_variables), *(option.envvar for option in mlflow_server().params)}
    for _, environment in mlflow_commands():
        assert {name for name in environment if name.startswith("MLFLOW_")} <= known


def test_the_server_answers_to_the_name_that_runs_use():
    (arguments, _), _ = mlflow_commands()
    (uri,) = {
        variable["value"]
        for container in containers(CLUSTER)
        for variable in container["env"]
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    (hosts,) = [each.partition("=")[2] for each in arguments if each.startswith("--allowed-hosts=")]
    assert uri.removeprefix("http://") in hosts.split(",")

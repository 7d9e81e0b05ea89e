"""The overlays build, and say to Ray what it knows."""

import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from manifests import (
    CLUSTER,
    HEAD,
    KUBERNETES,
    OBJECTS,
    OVERLAYS,
    WORKERS,
    built,
    containers,
    documents,
    muster_command,
    options,
    pins,
    ray_commands,
)

from configs import load

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside Ray and MLflow


def test_everything_is_found():
    assert {overlay.name for overlay in OVERLAYS} == {"cpu", "gpu", "job-cpu", "job-gpu"}
    kinds = [kind for kind, _ in OBJECTS]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "RayCluster": 1, "RayJob": 1, "PersistentVolumeClaim": 1, "NetworkPolicy": 4, "Service": 3, "Deployment": 1,
        "StatefulSet": 2,
    }  # fmt: skip


def test_kustomizations_name_what_is_there():
    named = set()
    for file in KUBERNETES.rglob("kustomization.yaml"):
        (kustomization,) = documents(file)
        for name in kustomization.get("resources", []) + kustomization.get("components", []):
            path = (file.parent / name).resolve()
            assert path.is_file() or (path / "kustomization.yaml").is_file(), f"{file}: {name}"
            named.add(path)
    kept = {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert kept - named == set()


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlay(overlay):
    objects = built(overlay)
    assert {each["metadata"]["namespace"] for each in objects} == {"muster"}
    kind = "RayJob" if overlay.name.startswith("job-") else "RayCluster"
    (found,) = [each for each in objects if each["kind"] in ("RayJob", "RayCluster")]
    assert found["kind"] == kind
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    device = "cuda" if overlay.name.endswith("gpu") else "cpu"
    images = {each["image"] for each in containers(cluster)}
    assert images == {f"registry.example.com/muster:0.1.0-{device}"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert gpus == (8 if device == "cuda" else 0)
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "muster-ray-token"}
    if kind == "RayJob":
        params = muster_command(found["spec"]["entrypoint"])
        config = load(params["config"], params["overrides"])
        assert config.run.root == "/runs"
        assert config.parallel.world_size == workers["replicas"] * max(gpus, 1)
        assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]


def test_tracking_builds():
    assert len(built(KUBERNETES / "tracking")) == 9


def test_the_fields_are_kuberays():
    """Names as in the reference of ray.io/v1, KubeRay 1.6; the pods' own fields are Kubernetes'."""
    assert CLUSTER.keys() == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert HEAD.keys() == {"rayStartParams", "template"}
    assert WORKERS.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert OBJECTS["RayJob", "muster"]["spec"].keys() == {
        "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "entrypoint",
        "runtimeEnvYAML",
    }  # fmt: skip
    texts = [value for group in (HEAD, WORKERS) for value in group["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in texts)


def test_ray_start_knows_the_parameters():
    for group in (HEAD, WORKERS):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options(ray_commands()["start"])
    assert (HEAD["rayStartParams"]["num-cpus"], HEAD["rayStartParams"]["num-gpus"]) == ("0", "0")


def test_ray_is_the_pinned_one():
    assert CLUSTER["rayVersion"] == pins()["ray"]


def test_a_pod_that_ends_has_time_for_a_checkpoint():
    for group in (HEAD, WORKERS):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        text = container["lifecycle"]["preStop"]["exec"]["command"][2]
        (wait,) = re.findall(r"timeout (\d+) ", text)
        assert pod["terminationGracePeriodSeconds"] >= int(wait) + 30
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
    drain = shlex.split(text.partition(";")[0])
    assert drain[:2] == ["ray", "drain-node"]
    given = ray_commands()["drain-node"].make_context("drain-node", drain[2:]).params
    assert given["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert given["deadline_remaining_seconds"] == int(wait)
    job = OBJECTS["RayJob", "muster"]["spec"]
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(int(wait))}}


def test_the_head_has_the_clusters_server():
    """In a loop that ends when it says that it cannot run, and goes on when it dies."""
    (container,) = HEAD["template"]["spec"]["containers"]
    text = container["lifecycle"]["postStart"]["exec"]["command"][2]
    (command,) = re.findall(r"until (muster .*?);", text)
    given = muster_command(command)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert given["address"] == f"127.0.0.1:{ports['gcs-server']}"
    assert (given["host"], given["port"], given["name"]) == ("0.0.0.0", ports["muster"], ["muster-head-svc"])
    assert [str(root) for root in given["root"]] == ["/runs"]
    loop = text.replace(command, "serve").replace("/proc/1/fd/1", "/dev/null").replace("sleep 1", "sleep 0")
    serve = 'serve() { echo x >>"$0"; [ $(wc -l <"$0") = 3 ] && return 2; return 137; }; '
    with tempfile.NamedTemporaryFile() as calls:
        subprocess.run(["bash", "-c", f"{serve}{loop} wait", calls.name], check=True, timeout=60)
        assert Path(calls.name).read_text() == "x\n" * 3


def test_health_is_where_ray_answers_without_a_token():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group in (HEAD, WORKERS):
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in PUBLIC_EXACT_PATHS
            assert ports[container[probe]["httpGet"]["port"]] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_runs_are_where_every_pod_reaches_them():
    claim = OBJECTS["PersistentVolumeClaim", "muster-runs"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (HEAD, WORKERS):
        pod = group["template"]["spec"]
        (volume,) = [each["name"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert mounts[volume] == "/runs"
        assert mounts.keys() == {each["name"] for each in pod["volumes"]}

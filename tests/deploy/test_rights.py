"""No secret is written down, and no container has a right that it does not need."""

import re
from pathlib import Path

import pytest
import yaml
from manifests import DEPLOY, OBJECTS, OVERLAYS, ROOT, SECRET, built, containers, pods, walk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside Ray and MLflow


def test_no_secret_is_written_down():
    assert [kind for kind, _ in OBJECTS if kind == "Secret"] == []
    variables = [each for container in containers(list(OBJECTS.values())) for each in container.get("env", [])]
    secrets = [each for each in variables if SECRET.search(each["name"]) and not each["name"].endswith("_FILE")]
    assert len(secrets) >= 5
    secrets += [each for each in variables if each["name"].startswith("PGPASS")]
    assert [each["name"] for each in secrets if "secretKeyRef" not in each.get("valueFrom", {})] == []
    for path in [*DEPLOY.rglob("*"), *(ROOT / "deploy" / "compose").glob(".*")]:
        if path.is_file():
            written = re.findall(r"://[^/\s:@]+:[^/\s@]+@", path.read_text())  # user:password@
            assert (path, written) == (path, [])


def test_pods_have_no_rights():
    found = pods(list(OBJECTS.values()))
    assert len(found) == 5
    for pod in found:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers([pod]):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"].keys() == {"requests", "limits"}


TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Ray's autoscaler looks for its token."""


def test_the_autoscaler_alone_has_a_token_and_a_way_to_the_api_server():
    from ray.autoscaler._private.kuberay import node_provider

    assert Path(node_provider.IN_CLUSTER_TOKEN_PATH) == Path(TOKEN_FOLDER) / "token"
    for overlay in OVERLAYS:
        objects = built(overlay)
        (found,) = [each for each in objects if each["kind"] in ("RayJob", "RayCluster")]
        cluster = found["spec"].get("rayClusterSpec", found["spec"])
        pod = cluster["headGroupSpec"]["template"]["spec"]
        tokens = [each["name"] for each in pod["volumes"] if "serviceAccountToken" in str(each)]
        policies = [each["spec"] for each in objects if each["metadata"]["name"] == "ray-autoscaler"]
        scaler = cluster.get("autoscalerOptions")
        if not cluster.get("enableInTreeAutoscaling"):
            assert (tokens, policies, scaler) == ([], [], None)
            assert cluster["workerGroupSpecs"][0]["replicas"] > 0
            continue
        (mount,) = scaler["volumeMounts"]
        assert [mount["name"]] == tokens
        assert (mount["mountPath"], mount["readOnly"]) == (TOKEN_FOLDER, True)
        assert not {each["name"] for used in containers(cluster) for each in used["volumeMounts"]} & set(tokens)
        assert scaler["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        (volume,) = [each for each in pod["volumes"] if each["name"] in tokens]
        paths = [item["path"] for source in volume["projected"]["sources"] for item in walk(source) if "path" in item]
        assert sorted(paths) == ["ca.crt", "namespace", "token"]
        (policy,) = policies
        assert policy["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
        assert {each["port"] for rule in policy["egress"] for each in rule["ports"]} == {443, 6443}


COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())


def test_compose_asks_for_its_secrets_and_listens_on_loopback():
    example = dict(
        line.split("=", 1)
        for line in (DEPLOY / "compose" / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert set(example.values()) == {""}
    asked = set()
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if SECRET.search(name) or name == "PGPASSWORD":
                (variable,) = re.findall(r"^\$\{(\w+):\?set it in \.env\}$", value)
                asked.add(variable)
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "healthcheck" in service or name_of(service) == "store"  # which ends
    assert asked == example.keys()
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def name_of(service: dict) -> str:
    return next(name for name, each in COMPOSE["services"].items() if each is service)


def test_compose_gives_no_rights():
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])

"""Services lead to their pods, and network policies let through what is called and nothing else."""

import re

import pytest
from manifests import OBJECTS, containers, walk

from cluster.server.serving import PORT


def labelled(selector: dict) -> list[dict]:
    """Pod templates that a selector picks."""
    wanted = selector.get("matchLabels", {}).items()
    chosen = [each for each in walk(list(OBJECTS.values())) if "spec" in each and "containers" in each["spec"]]
    found = [each for each in chosen if wanted <= each["metadata"]["labels"].items()]
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        found = [each for each in found if each["metadata"]["labels"].get(rule["key"]) in rule["values"]]
    return found


def ports_of(templates: list[dict]) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in containers(templates) for port in each.get("ports", [])}


@pytest.mark.parametrize("name", ["mlflow", "postgres", "minio"])
def test_service_leads_to_a_port_of_its_pod(name):
    spec = OBJECTS["Service", name]["spec"]
    templates = labelled({"matchLabels": spec["selector"]})
    assert len(templates) == 1
    (port,) = spec["ports"]
    assert ports_of(templates)[port["targetPort"]] == port["port"]
    for container in containers(templates):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["port"] in ports_of(templates)


def test_addresses_are_services():
    places = {name: spec["spec"]["ports"][0]["port"] for (kind, name), spec in OBJECTS.items() if kind == "Service"}
    named = set()
    for container in containers(list(OBJECTS.values())):
        for variable in container.get("env", []):
            for host, port in re.findall(r"://(?:\w+@)?([a-z]+):(\d+)", variable.get("value", "")):
                assert places[host] == int(port)
                named.add(host)
    assert named == places.keys()


def test_policies_let_in_only_what_is_named():
    for name, count in (("ray", 2), ("mlflow", 1), ("mlflow-stores", 2)):
        spec = OBJECTS["NetworkPolicy", name]["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        chosen = labelled(spec["podSelector"])
        assert len(chosen) == count
        for rule in spec["ingress"]:
            assert all("podSelector" in peer for peer in rule["from"])
            for peer in rule["from"]:  # a pod of any namespace could carry the label
                assert peer.get("namespaceSelector") != {}
            for port in rule.get("ports", []):
                assert port["port"] in ports_of(chosen).values()
    among, operator, clients = OBJECTS["NetworkPolicy", "ray"]["spec"]["ingress"]
    assert len(labelled(among["from"][0]["podSelector"])) == 2
    assert [[port["port"] for port in rule["ports"]] for rule in (operator, clients)] == [[8265], [PORT]]


def test_policies_let_out_what_a_pod_calls_and_nothing_else():
    """An address in a container's environment has a rule that leads to its pods, and each rule such an address."""
    called = {"ray": {"mlflow"}, "mlflow": {"postgres", "minio"}, "mlflow-stores": set()}
    for name, services in called.items():
        spec = OBJECTS["NetworkPolicy", name]["spec"]
        assert ("egress" in spec) is True
        reached = set()
        for rule in spec["egress"]:
            if rule.get("ports") == [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]:
                assert services
                continue
            (peer,) = rule["to"]
            (component,) = {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in labelled(
                peer["podSelector"]
            )}  # fmt: skip
            if component == "ray" == name:
                continue
            (port,) = rule["ports"]
            assert port["port"] == OBJECTS["Service", component]["spec"]["ports"][0]["port"]
            reached.add(component)
        texts = [
            variable.get("value", "")
            for container in containers(labelled(spec["podSelector"]))
            for variable in container.get("env", [])
        ]
        named = {host for text in texts for host in re.findall(r"://(?:\w+@)?([a-z]+):\d+", text)}
        assert reached == services == named

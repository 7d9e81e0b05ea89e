"""Grafana's dashboard and Prometheus' configuration, held against what a server with runs and a queue answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import TOKEN, Dashboard, serving, write_run
from hostile_messages import GOOD
from prometheus_client.parser import text_string_to_metric_families
from queues import Queue

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboard.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
ADDED = {"instance", "job"}
"""Labels that Prometheus puts on whatever it reads."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """Of a run that is being trained, and a queue with a job; nothing has failed, and that too is told."""
    folder = tmp_path_factory.mktemp("grafana")
    write_run(folder / "runs" / 'a "b"\\c', status=None, of=1000, mfu=0.4)
    here = Queue(folder)
    here.send(GOOD)
    with serving([folder / "runs"], board=here.board) as found:
        found.look()
        yield found


@pytest.fixture(scope="module")
def told(server: Dashboard) -> dict[str, list[dict[str, str]]]:
    """The labels of each sample by the metric's name, as Prometheus would read them."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").body.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Every expression with where it stands."""
    for title, panel in PANELS.items():
        for target in panel["targets"]:
            yield title, target["expr"]
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            yield f"${name}", variable["query"]["query"]


def selectors(expression: str) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Each metric of an expression, and what is asked of its labels: an operator and a value."""
    for name, labels in re.findall(r"\b(muster_\w+)(?:\{([^}]*)\})?", expression):
        yield name, {key: (sign, value) for key, sign, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', labels)}


def test_what_is_queried_is_there(told: dict[str, list[dict[str, str]]]):
    asked = [(where, *each) for where, expression in queries() for each in selectors(expression)]
    assert len(asked) >= len(PANELS) + 2
    for where, name, labels in asked:
        assert name in told, f"{where}: {name} is not in /metrics"
        for label, (sign, value) in labels.items():
            if label in ADDED:
                continue
            values = {sample[label] for sample in told[name] if label in sample}
            assert values, f"{where}: {name} has no label {label}"
            wanted = set() if value.startswith("$") else set(value.split("|")) if sign == "=~" else {value}
            assert wanted <= values, f"{where}: {name} has no {label} {wanted - values}"
    assert {name for _, name, _ in asked} == told.keys(), "every metric has a place on the dashboard"


def test_its_panels_are_named_and_have_units():
    assert len(PANELS) == len(DASHBOARD["panels"]) == len({panel["id"] for panel in DASHBOARD["panels"]})
    for title, panel in PANELS.items():
        assert title.strip()
        assert panel["description"].strip(), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["targets"], title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
    used = set(re.findall(r"\$(\w+)", json.dumps(DASHBOARD["panels"]))) | {"datasource"}
    assert used == VARIABLES.keys()


def test_its_panels_do_not_overlap():
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))


def test_prometheus_is_let_in_as_it_is_configured(server: Dashboard):
    """With the token of the file, and only with it."""
    (scrape,) = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())["scrape_configs"]
    authorization: dict[str, Any] = scrape["authorization"]
    assert authorization.keys() == {"type", "credentials_file"}, "no token in the configuration itself"
    path = scrape["metrics_path"]
    answer = server.ask(
        "GET", path, authorization=f"{authorization['type']} {TOKEN}", accept="text/plain;version=0.0.4"
    )
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert server.ask("GET", path).status == 401
    assert server.ask("GET", path, authorization=f"{authorization['type']} {TOKEN[::-1]}").status == 401
    assert [each["targets"] for each in scrape["static_configs"]] == [["127.0.0.1:8267"]]

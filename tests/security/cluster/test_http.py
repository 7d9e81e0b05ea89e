"""Nobody gets an answer from Ray's HTTP servers without the token, whatever the path and the method."""

import http.client
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from muster_cluster import status

pytestmark = pytest.mark.ray

PUBLIC = {
    "/", "/favicon.ico",  # the page that asks for the token, and /static/ below
    "/api/authentication_mode", "/api/authenticate",  # whether it is asked for; the token, for a cookie
    "/api/healthz", "/api/gcs_healthz", "/api/local_raylet_healthz", "/-/healthz",  # "success", for probes
}  # fmt: skip
"""What Ray answers to everyone by design."""
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD")
REFUSED = (401, 403)
NO_TOKENS = (
    {}, {"Authorization": "Bearer " + "0" * 64}, {"Authorization": "Bearer "}, {"X-Ray-Authorization": "x"},
    {"Cookie": "ray-authentication-token=x"},
)  # fmt: skip


def routes(live, log: str) -> set[str]:
    """What a server of Ray's says in its log that it answers."""
    [path] = live.folder.glob(f"ray/session_2*/logs/{log}")
    found = re.findall(r"<ResourceRoute \[\w+\] <(?:Plain|Dynamic)Resource\s+(\S+)>", path.read_text())
    return {re.sub(r"\{[^}]*\}", "x", route) for route in found}


def answers(url: str, paths: list[str]) -> dict[tuple[str, str, str], int]:
    """The status of each path by each method, without the token."""
    host = url.removeprefix("http://")

    def ask(path: str, method: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(host, timeout=20)
        try:
            connection.request(method, path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    asked = list(product(paths, METHODS, NO_TOKENS))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda each: ask(*each), asked))
    return {(path, method, str(headers)): code for (path, method, headers), code in zip(asked, found, strict=True)}


@pytest.mark.slow
def test_the_dashboard_and_the_job_api(live):
    every = routes(live, "dashboard.log")
    assert len(every) > 33
    assert {"/api/jobs/", "/api/jobs/x/stop", "/api/packages/x/x", "/api/version", "/api/v0/logs"} <= every
    others = ["/nothing", "/api", "/logs", "/static", "/api/jobs/../../etc/passwd", "//api/jobs/"]
    asked = [*sorted(every - PUBLIC), *others]
    wrong = {key: code for key, code in answers(live.ray_url, asked).items() if code not in REFUSED}
    assert wrong == {}
    assert status(f"{live.ray_url}/api/version", live.token.read_text()) == 200


@pytest.mark.slow
def test_what_everyone_may_read_tells_nothing(live):
    for path in sorted(PUBLIC - {"/", "/favicon.ico"}):
        connection = http.client.HTTPConnection(live.ray_url.removeprefix("http://"), timeout=20)
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert len(text) < 200, text
        assert live.token.read_text() not in text


@pytest.mark.slow
def test_the_agent_of_a_machine(live):
    port = next(option.partition("=")[2] for option in live.head.args if "agent-listen-port" in option)
    url = f"http://127.0.0.1:{port}"
    every = routes(live, "dashboard_agent.log")
    assert "/api/job_agent/jobs/" in every
    paths = [*sorted(every - PUBLIC), "/logs/", "/logs/x", "/nothing"]
    wrong = {key: code for key, code in answers(url, paths).items() if code not in REFUSED}
    assert wrong == {}
    assert status(f"{url}/api/job_agent/jobs/x/logs", live.token.read_text()) not in (*REFUSED, None)

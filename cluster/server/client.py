"""HTTP client of a cluster's server, for the command line."""

import contextlib
import hmac
import http.client
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from pydantic import ValidationError

from cluster.gangs.access_token import (
    Address,
    in_environment,
    is_known,
    known_tokens,
    proof_of,
    remember,
    token_file,
    use_token,
    within,
)
from cluster.gangs.session import found_by_ray
from cluster.gangs.share import Node
from configs import ConfigError, mask
from configs.reading.parse import clip, parse_json, shortened
from configs.units import byte_size

from .messages import Known
from .outlook import Outlook
from .pack import LIMIT
from .serving import PORT

CONNECTING = 10.0
"""Seconds for a server to connect and to identify itself."""
ANSWERING = 120.0
"""Seconds for an answer; while a package is sent, for each piece of it."""
PATIENCE = 45.0
"""Seconds for which requests are repeated while the server is down: it is restarted when it dies."""
STARTING = 15.0
"""Seconds to wait for a server that this user has reached before and that refuses or drops connections now."""
LOOKING = 30.0
"""Seconds to wait for a fresh list of machines; a new head has none at first."""
LONGEST_HEALTH, LONGEST_ANSWER = 1 << 12, 64 << 20
"""Most bytes of /health, and of any other answer."""
WAIT = 20.0
"""Seconds for which the server waits for output before it answers."""
FIELDS = set(Known.model_fields)


class Output(NamedTuple):
    """A piece of a job's output."""

    text: str
    next: int
    """Offset of the next piece."""
    there: bool
    """Whether the cluster has any output of it."""
    ended: bool
    """Whether this is the last piece."""


class Cluster:
    """A cluster's server.

    Every method raises ConfigError if the server refuses the request, with its reason, if it refuses the token, or if
    it does not answer for longer than a restart takes.
    """

    def __init__(self, address: Address) -> None:
        use_token(address)
        self.url = address.where
        told = self._ask("GET", "/api/machines")
        with self._sense():
            _ = told["machines"]
        remember(self.url, self.url.removeprefix("http://"))

    def nodes(self) -> list[Node]:
        """Total resources of each machine, as of now. Raises ConfigError if the server cannot reach Ray."""
        until, asked = time.monotonic() + LOOKING, None
        while True:
            told = self._ask("GET", "/api/machines")  # this makes the server query Ray again
            with self._sense():
                asked = float(told["time"]) if asked is None else asked
                found = [Node(float(each["cpus"]), float(each["gpus"])) for each in told["machines"]]
                if told["reachable"] and found and told["seen"] >= asked:
                    return found
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        why = clip(told.get("why") or "it does not report its machines")
        raise ConfigError(f"the server at {mask(self.url)} cannot reach Ray: {why}")

    def jobs(self) -> dict[str, Known]:
        """All jobs of the queue by id, oldest first."""
        return {id: job for id, (job, _) in self.board().items()}

    def board(self) -> dict[str, tuple[Known, Outlook]]:
        """All jobs of the queue by id, oldest first, with their outlook."""
        told = self._ask("GET", "/api/jobs")
        with self._sense():
            return {row["id"]: (_job(row), _outlook(row)) for row in told["jobs"]}

    def job(self, id: str) -> tuple[Known, Outlook, int]:
        """A job, its outlook, and how many jobs will start before it."""
        row = self._ask("GET", f"/api/jobs/{quote(id, safe='')}")
        with self._sense():
            return _job(row), _outlook(row), int(row["ahead"])

    def submit(self, package: Path) -> Known:
        """Submit a job. Raises ConfigError if its package is too large."""
        if (size := package.stat().st_size) > LIMIT:
            raise ConfigError(f"what is to be sent has {byte_size(size)} and the limit is {byte_size(LIMIT)}")
        row = self._ask("POST", "/api/jobs", package)
        with self._sense():
            return _job(row)

    def stop(self, id: str, now: bool) -> Known:
        return self._change(id, "stop", {"now": now})

    def retry(self, id: str, new: str) -> Known:
        return self._change(id, "retry", {"new": new})

    def set_priority(self, id: str, priority: int) -> Known:
        return self._change(id, "priority", {"priority": priority})

    def output(self, id: str, offset: int = 0, wait: float = 0.0) -> Output:
        """A job's output from an offset on.

        Args:
            wait: seconds for which the server may wait for output if there is none yet.
        """
        query = urlencode({"offset": offset, "wait": wait})
        said = self._ask("GET", f"/api/jobs/{quote(id, safe='')}/log?{query}")
        with self._sense():
            return Output(str(said["text"]), int(said["next"]), bool(said["there"]), bool(said["ended"]))

    def _change(self, id: str, what: str, body: Mapping[str, Any]) -> Known:
        row = self._ask("POST", f"/api/jobs/{quote(id, safe='')}/{what}", json.dumps(body).encode())
        with self._sense():
            return _job(row)

    @contextlib.contextmanager
    def _sense(self) -> Iterator[None]:
        """Turns errors from a malformed answer into a ConfigError."""
        try:
            yield
        except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _silent(self.url, error) from None

    def _ask(self, method: str, path: str, body: bytes | Path | None = None) -> Any:
        """The server's answer. Requests are idempotent, and repeated while the server is down."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                send = partial(_request, self.url, method, path, body)
                status, said, _ = send() if isinstance(body, Path) else within(ANSWERING, send)
            except UNLIKE as error:
                if time.monotonic() > until or isinstance(error, ValueError):
                    raise _silent(self.url, error) from None
                time.sleep(0.5)
                continue
            if status == 200:
                return said
            reason = clip(said.get("error") if isinstance(said, dict) else "") or f"it answers {status}"
            if status in (401, 403):
                raise ConfigError(
                    f"the cluster at {mask(self.url)} refuses the token: copy the token of its head to here, or name "
                    f"its file in RAY_AUTH_TOKEN_PATH"
                )
            raise ConfigError(f"the queue of {mask(self.url)} refused it: {reason}")


def _job(row: Mapping[str, Any]) -> Known:
    return Known.model_validate({key: value for key, value in row.items() if key in FIELDS})


def _outlook(row: Mapping[str, Any]) -> Outlook:
    return Outlook(**{key: row["outlook"][key] for key in Outlook._fields})


def api_url(address: str | None, from_config: Address | None = None) -> Address:
    """URL of a cluster's server, given its own URL, that of Ray's dashboard, the host:port of Ray's head, or `auto`.

    Unless it is its own, the server is expected at port 8267 of the same host, and must prove that it has the token
    before the token is sent there.

    Args:
        address: from the command line; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, then `from_config`.

    Raises:
        ConfigError: no address is given, no server answers there, or the token must not be sent there.
    """
    named = Address(address, "command") if address else in_environment("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    given = named or from_config
    if given is None:
        raise ConfigError(
            "no cluster is named: --address http://HOST:8267, RAY_API_SERVER_ADDRESS, RAY_ADDRESS or cluster.address; "
            "`muster cluster up` starts one"
        )
    _check_address(given.where)
    if not given.where.startswith(("http://", "https://")):
        given = found_by_ray(given)
        if ":" not in (where := given.where):
            raise ConfigError(f"{where} has no port: --address http://{where}:8267, or {where}:6379 (the head's)")
    given = given._replace(where=given.where.rstrip("/"))
    use_token(given)
    own = given.where if "//" in given.where else f"http://{given.where}"
    wrong, until = _health(own), time.monotonic() + STARTING
    while isinstance(wrong, ConnectionError) and is_known(own) and time.monotonic() < until:
        time.sleep(0.5)
        wrong = _health(own)
    if isinstance(wrong, Health):
        return wrong.checked(given._replace(where=own))
    host = urlsplit(own).hostname or ""
    usual = f"http://{f'[{host}]' if ':' in host else host}:{PORT}"
    if own != usual and isinstance(found := _health(usual), Health):
        if not found.proven:
            raise ConfigError(
                f"the server at {usual} does not prove that it is your cluster's: if it is, name it yourself, "
                f"--address {usual}, and copy the token of its head to {token_file()}"
            )
        remember(given.where)
        return found.checked(Address(usual, "command"))  # as good as named by the user: nobody else has the token
    raise _silent(given.where, wrong)


class Health(NamedTuple):
    """What a server tells everyone about itself."""

    queue: bool
    """Whether it has a job queue."""
    proven: bool
    """Whether it has the user's token, and itself listens at the address that was asked."""

    def checked(self, address: Address) -> Address:
        """Returns the address. Raises ConfigError for a dashboard without a queue."""
        if not self.queue:
            raise ConfigError(
                f"{mask(address.where)} is `muster dashboard`, without a cluster: `muster cluster serve` has the queue"
            )
        return address


def _health(url: str) -> Health | Exception | str:
    """Ask a server about itself, without sending the token. Returns an error or a reason if it is not one of ours."""
    nonce = secrets.token_hex(16)
    try:
        status, said, asked = within(CONNECTING, lambda: _request(url, "GET", f"/health?prove={nonce}", shown=False))
    except UNLIKE as error:
        return error
    if status != 200 or not isinstance(said, dict) or said.get("server") != "muster":
        return "it is not a cluster's server"
    token = next(iter(known_tokens()), "")
    proven = hmac.compare_digest(str(said.get("proof")), proof_of(token, nonce, *asked))
    return Health(said.get("queue") is True, proven)


UNLIKE = (OSError, http.client.HTTPException, ValueError, RecursionError)
"""Raised if nothing answers, or something that is not one of our servers."""


def _request(
    url: str, method: str, path: str, body: bytes | Path | None = None, shown: bool = True
) -> tuple[int, Any, tuple[str, int]]:
    """(status, JSON body, the server's (host, port)) of a response. Redirects are not followed.

    Args:
        body: JSON, or the path of a package.
        shown: send the token.

    Raises one of UNLIKE.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=CONNECTING)
    with contextlib.closing(connection), contextlib.ExitStack() as stack:
        connection.connect()
        asked = connection.sock.getpeername()[:2]
        connection.sock.settimeout(ANSWERING)
        headers = {"accept": "application/json"}
        if shown:
            headers["authorization"] = f"Bearer {next(iter(known_tokens()), '')}"
        content: bytes | BinaryIO | None = body if not isinstance(body, Path) else stack.enter_context(body.open("rb"))
        if isinstance(body, Path):
            headers |= {"content-type": "application/zip", "content-length": str(body.stat().st_size)}
        elif body is not None:
            headers["content-type"] = "application/json"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
            connection.request(method, parts.path.rstrip("/") + path, content, headers)
        answer, most = connection.getresponse(), LONGEST_ANSWER if shown else LONGEST_HEALTH
        text = answer.read(most + 1)
        if len(text) > most:
            raise ValueError(f"its answer has over {byte_size(most)}")
        return answer.status, parse_json(text), asked


def _check_address(where: str) -> None:
    """Raise ConfigError for what is no address, before a token for it is looked for."""
    try:
        parts = urlsplit(where if "//" in where else f"//{where}")
        wrong = "" if parts.hostname else "names no host"
        if parts.port == 0:
            wrong = "has port 0"
    except ValueError as error:  # a port above 65,535, or half an IPv6 address
        wrong = f"is none ({error})"
    if wrong:
        raise ConfigError(f"the cluster's address {shortened(mask(where))} {wrong}: --address http://HOST:{PORT}")


def _silent(where: str, error: Exception | str) -> ConfigError:
    reason = clip(error, 200) or type(error).__name__
    return ConfigError(
        f"no cluster server answers at {mask(where)} ({reason}), nor on port {PORT} of that host.\n"
        f"Give its address (--address http://HOST:{PORT}; a tunnel must forward that port), or start it: `muster "
        "cluster up`, or `muster cluster serve` if Ray is running already"
    )

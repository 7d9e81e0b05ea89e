"""A cluster's token goes to its cluster and to nobody else, whatever address a file names."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import typer
from dashboards import TOKEN as SERVER_TOKEN
from dashboards import serving
from no_hang import ends
from queues import Queue
from second_user import _BECOME_NOBODY, NOBODY, needs_second_user

from cluster.gangs import access_token, join
from cluster.gangs.access_token import Address
from cluster.server import client
from cluster.server.client import Cluster, api_url
from configs import ConfigError

ROOT = Path(__file__).parents[3]
TOKEN = "5ec7e7" * 10
CONFIG = """
run: {{root: {root}}}
model: {{num_layers: 1, hidden_size: 32, num_heads: 2, num_experts: 0, vocab_size: 320}}
data: {{path: {data}}}
cluster: {{address: "{address}"}}
"""
SWEEP = "{{name: s, root: {root}, base: run.yaml, grid: {{}}, axes: {{optim.lr: [1.0e-3]}}}}"


HEALTH = {"status": "ok", "server": "muster", "queue": True, "proof": None}
MACHINES = {"machines": [], "reachable": True, "why": ""}


class Spy:
    """Listens on a port, as a cluster's server or Ray's job API; keeps every byte that it is sent."""

    def __init__(self, redirect: str | None = None) -> None:
        self.seen: list[bytes] = []
        spy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                spy.seen.append(self.requestline.encode() + bytes(self.headers))
                if redirect and not self.path.startswith(("/health", "/api/authentication_mode")):
                    self.send_response(307)
                    self.send_header("Location", redirect + self.path)
                    self.end_headers()
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(HEALTH | MACHINES | {"authentication_mode": "token"}).encode())

            do_POST = do_PUT = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def got_token(self) -> bool:
        return any(TOKEN.encode() in request for request in self.seen)


class Raw:
    """A TCP port that keeps what comes, as a head that speaks gRPC would."""

    def __init__(self) -> None:
        self.seen = b""
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                threading.Thread(target=self._keep, args=[connection], daemon=True).start()

    def _keep(self, connection: socket.socket) -> None:
        # An HTTP/2 server's first words, so that a gRPC client goes on to send its headers.
        with contextlib.suppress(OSError), connection:
            connection.sendall(b"\0\0\0\4\0\0\0\0\0")
            connection.settimeout(5)
            while more := connection.recv(1 << 16):
                self.seen += more


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The user's token, with nothing beside it."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(client, "PORT", 9)  # where nobody listens
    monkeypatch.chdir(tmp_path)
    return tmp_path / "token"


def write(folder: Path, address: str, data: Path) -> None:
    (folder / "run.yaml").write_text(CONFIG.format(root=folder / "runs", data=data, address=address))
    (folder / "sweep.yaml").write_text(SWEEP.format(root=folder / "runs"))


def command(*arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-P", "-m", "cluster.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(whole, env=environment, text=True, capture_output=True, timeout=timeout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "run.yaml"],
        pytest.param(["train", "run.yaml"], marks=pytest.mark.slow),
        pytest.param(["sweep", "submit", "sweep.yaml", "set.cluster={max_failures: 2}"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_an_address_of_a_file_gets_no_token(mine, tmp_path, tiny_data, arguments):
    spy, raw = Spy(), Raw()
    for address in (raw.address,) if arguments[0] == "train" else (spy.url, raw.address):
        write(tmp_path, address, tiny_data)
        done = command(*arguments)
        assert done.returncode == 2, done.stderr
        assert f"cluster.address={address} on the command line" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 3
    assert spy.seen == []
    assert raw.seen == b""
    assert not mine.with_name("token.clusters").exists()


def test_the_users_own_word_is_enough_and_is_remembered(mine, tmp_path):
    spy = Spy()
    with pytest.raises(ConfigError, match="from a file"):
        Cluster(api_url(None, Address(spy.url, "file")))
    assert spy.seen == []
    Cluster(api_url(spy.url + "/"))
    assert spy.got_token
    Cluster(api_url(None, Address(spy.url, "file")))
    assert mine.with_name("token.clusters").stat().st_mode & 0o777 == 0o600
    assert TOKEN not in mine.with_name("token.clusters").read_text()
    mine.write_text("a" * 60)  # of another cluster
    with pytest.raises(ConfigError, match="from a file"):
        Cluster(api_url(None, Address(spy.url, "file")))


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_a_variable_is_the_users_word(mine, monkeypatch, variable):
    spy = Spy()
    monkeypatch.setenv(variable, spy.url)
    Cluster(api_url(None, Address("http://127.0.0.1:1", "file")))
    assert spy.got_token


@pytest.mark.parametrize(
    ("overrides", "by"),
    [
        ([], "file"), (["optim.lr=1"], "file"), (["run.name=cluster.address=x"], "file"),
        (["cluster.timeout=5"], "file"), (["cluster={max_failures: 2}"], "file"), (["set={train.steps: 3}"], "file"),
        (["set.cluster={max_failures: 2}"], "file"), (["set={cluster: {max_failures: 2}}"], "file"),
        (["set=1", "cluster=h:1", "cluster.address.x=h:1"], "file"), (["variants.a.cluster.address=h:1"], "file"),
        (["cluster.address=other:1"], "file"), (["cluster.address=h:1", "cluster.address=other:1"], "file"),
        (["base=h:1"], "file"), (["set.base=h:1"], "file"), (["cluster={address: 'h:2'}"], "file"),
        (["cluster.address=h:1"], "command"), (["set.cluster.address=h:1"], "command"),
        (["cluster={address: 'h:1'}"], "command"), (["set={cluster.address: 'h:1'}"], "command"),
        (["set={cluster: {address: 'h:1'}}"], "command"), (["set.cluster={address: 'h:1', timeout: 5}"], "command"),
    ],
)  # fmt: skip
def test_an_override_is_the_users_word(overrides, by):
    assert access_token.in_config("h:1", overrides) == Address("h:1", by)


def test_a_redirect_does_not_take_the_token_along(mine):
    other = Spy()
    spy = Spy(redirect=other.url)
    with contextlib.suppress(Exception):
        Cluster(api_url(spy.url))
    assert spy.got_token
    assert other.seen == []


def test_asking_whether_it_is_open_shows_nothing(mine):
    spy = Spy()
    assert not access_token.is_open(spy.url)
    access_token.refuse_open(spy.url)
    assert spy.seen
    assert not spy.got_token


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"[]", b"7", b"null", b"[" * 4000, b"{}", b"<html>", b"\xff\xfe", b'{"server": ["muster"]}',
        b'{"server": NaN}', b'{"a": ' + b"9" * 4000 + b"}", b'{"server": "another", "queue": true}',
    ],
    ids=lambda answer: repr(answer[:30]),
)  # fmt: skip
def test_what_is_no_cluster_is_one_message(mine, answer):
    with strange(lambda path: (200, answer)) as url, pytest.raises(ConfigError) as refused:
        Cluster(api_url(url))
    assert f"no cluster server answers at {url} (" in str(refused.value)
    assert "`muster cluster serve` if Ray is running already" in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_dashboard_without_a_cluster_is_told_from_one(mine):
    with serving([]) as server, pytest.raises(ConfigError, match="is `muster dashboard`, without a cluster"):
        api_url(f"http://{server.host}")


@pytest.mark.parametrize(
    ("code", "answer"),
    [(200, b"<html>"), (500, b"x"), (200, b"[]"), (200, b"{}"), (404, b""), (302, b""), (200, b'{"machine": 7}')],
)
def test_what_is_one_only_at_first_is_one_message(mine, code, answer):
    def answers(path):
        return (200, json.dumps(HEALTH).encode()) if path.startswith("/health") else (code, answer)

    with strange(answers) as url, pytest.raises(ConfigError, match="no cluster server answers at"):
        Cluster(api_url(url))


@pytest.mark.parametrize("answer", [{}, {"machines": 7, "jobs": 7}, [], "<html>", {"machines": [{}], "jobs": [{}]}])
def test_nonsense_after_a_good_start_is_one_message(mine, answer):
    said = [HEALTH, MACHINES]

    def answers(path):
        return 200, json.dumps(said.pop(0) if said else answer).encode()

    with strange(answers) as url:
        cluster = Cluster(api_url(url))
        for ask in (cluster.nodes, cluster.jobs):
            with pytest.raises(ConfigError, match="no cluster server answers at"):
                ask()


def test_an_answer_without_an_end_is_not_waited_for(mine, monkeypatch):
    monkeypatch.setattr(client, "CONNECTING", 1.0)
    sent_whole = []

    def long(size, pause):
        for _ in range(1500):
            yield b" " * size
            time.sleep(pause)
        sent_whole.append((size, pause))

    for size, pause in ((2**16, 0.0), (1, 0.2)):
        with strange(lambda path, size=size, pause=pause: (200, long(size, pause))) as url:
            with pytest.raises(ConfigError, match="no cluster server"):
                Cluster(api_url(url))
            assert sent_whole == []


@pytest.fixture
def usual(mine, tmp_path, monkeypatch):
    """A cluster's server, of the user's token, at the port at which it is looked for."""
    mine.write_text(SERVER_TOKEN)
    folder = tmp_path / "queue"
    folder.mkdir()
    with serving([], board=Queue(folder).board) as server:
        monkeypatch.setattr(client, "PORT", server.port)
        yield server


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_server_is_found_beside_what_was_named(usual, scheme):
    """By the address of Ray's dashboard or of the head, whoever listens there."""
    spy, raw = Spy(), Raw()
    spy.server.RequestHandlerClass.do_GET = lambda self: self.send_error(401)
    for named in (spy.url.removeprefix("http://"), raw.address):
        assert api_url(f"{scheme}{named}") == Address(f"http://{usual.host}", "command")
    assert SERVER_TOKEN.encode() not in raw.seen
    assert not spy.got_token
    assert Cluster(api_url(f"{scheme}{raw.address}")).jobs() == {}


def test_what_cannot_prove_that_it_has_the_token_is_not_shown_it(usual, mine, monkeypatch):
    mine.write_text("a" * 64)
    with pytest.raises(ConfigError, match="does not prove that it is your cluster's"):
        api_url("127.0.0.1:1")
    mine.write_text(SERVER_TOKEN)
    api_url("127.0.0.1:1")

    def passed_on(path):  # by another user's server, who asks the real one
        answer = usual.ask("GET", path)
        return answer.status, answer.body

    with strange(passed_on) as url:
        monkeypatch.setattr(client, "PORT", int(url.rpartition(":")[2]))
        with pytest.raises(ConfigError, match="does not prove that it is your cluster's"):
            api_url("127.0.0.1:1")


@contextlib.contextmanager
def strange(answers):
    """A server that answers each path with a status and bytes, or pieces of them; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            code, content = answers(self.path)
            with contextlib.suppress(OSError):
                self.send_response(code)
                self.end_headers()
                for piece in [content] if isinstance(content, bytes) else content:
                    self.wfile.write(piece)
                    self.wfile.flush()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.block_on_close = False


LISTEN = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
time.sleep(60)
"""


@needs_second_user
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_another_users_port_on_this_machine_gets_no_token(mine, host):
    """The tunnel is down, and somebody else listens where it was."""
    begin = [sys.executable, "-c", _BECOME_NOBODY, LISTEN, "socket,time", host]
    with subprocess.Popen(begin, stdout=subprocess.PIPE, text=True) as theirs:
        try:
            port = int(theirs.stdout.readline())
            for name in ("127.0.0.1", "localhost", "0.0.0.0", *(own_ip() if host == "0.0.0.0" else ())):
                where = f"http://{name}:{port}"
                access_token.remember(where)
                for by in ("file", "environment", "found"):
                    with pytest.raises(ConfigError, match=rf"another user of this machine \(uid {NOBODY}\)"):
                        access_token.use_token(Address(where, by))
                access_token.use_token(Address(where, "command"))
        finally:
            theirs.kill()


def own_ip() -> list[str]:
    found = [each.address for entries in psutil.net_if_addrs().values() for each in entries]
    return [address for address in found if address.count(".") == 3 and not address.startswith("127.")][:1]


def test_what_ray_finds_by_itself_must_be_ours(mine):
    with socket.create_server(("127.0.0.1", 0)) as server:
        access_token.use_token(Address(f"127.0.0.1:{server.getsockname()[1]}", "found"))
    with pytest.raises(ConfigError, match="from a file"):
        access_token.use_token(Address("192.0.2.1:6379", "found"))


def test_a_head_knows_its_own_addresses(mine, monkeypatch):
    monkeypatch.setattr(join, "run_head", lambda *_: 0)
    monkeypatch.setattr(join, "_refuse_taken", lambda *_: None)  # a cluster may be up on this machine
    for arguments in (["--port=7001"], ["--dashboard-port", "7002"], ["--server-port", "7004"]):
        monkeypatch.setattr(sys, "argv", ["muster", "up", *arguments])
        with pytest.raises(SystemExit):
            join.app()
    for where in (
        "127.0.0.1:7001", "http://127.0.0.1:8265", "http://localhost:7002", "127.0.0.1:6379", "http://127.0.0.1:8267",
        "http://127.0.0.1:7004",
    ):  # fmt: skip
        access_token.use_token(Address(where, "file"))
    with pytest.raises(ConfigError):
        access_token.use_token(Address("127.0.0.1:7003", "file"))


@pytest.mark.parametrize(
    "where",
    ["http://127.0.0.1:8265\\@evil.example", "http://127.0.0.1:8265#@evil", "http://a b", "ftp://h:1", "h:9999999", ""],
)
def test_what_programs_read_differently_is_no_address(mine, where):
    with pytest.raises(ConfigError, match="not a cluster's address"):
        access_token.use_token(Address(where, "command"))


@pytest.mark.parametrize(
    "strange",
    [
        "http://127.0.0.1:8265@evil.example", "http://head.example:8266", "https://head.example:8265",
        "http://head.example.evil:8265", "http://head.example:8265/other", "head.example:8265", "http://head.example",
    ],
)  # fmt: skip
def test_one_known_address_does_not_stand_for_another(mine, strange):
    access_token.remember("http://head.example:8265", "http://127.0.0.1:8265")
    access_token.use_token(Address("http://HEAD.example:8265/", "file"))
    with pytest.raises(ConfigError, match="from a file"):
        access_token.use_token(Address(strange, "file"))


def test_a_place_that_cannot_be_written_only_forgets(mine, monkeypatch):
    (mine.with_name("token.clusters")).mkdir()
    access_token.remember("h:1")
    access_token.use_token(Address("h:1", "command"))
    with ends(), pytest.raises(ConfigError):
        access_token.use_token(Address("h:1", "file"))


def test_an_old_token_is_found_where_it_was(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    access_token.use_token(Address("h:1", "environment"))
    monkeypatch.delenv("RAY_AUTH_MODE")


def test_an_address_without_a_port_is_told_which(mine):
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1 has no port: --address http://10\.0\.0\.1:8267, or "):
        api_url("10.0.0.1")


def test_a_token_that_others_could_read_is_closed_to_them(mine, capsys):
    for use in (lambda: access_token.use_token(Address("h:1", "command")), access_token.make_token):
        mine.chmod(0o644)
        use()
        assert mine.stat().st_mode & 0o777 == 0o600
        assert f"{mine} was open to other users" in capsys.readouterr().err
        use()
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff", None])
def test_a_file_without_a_token_is_one_message(mine, content):
    mine.unlink()
    mine.mkdir() if content is None else mine.write_bytes(content)
    for use in (lambda: access_token.use_token(Address("h:1", "command")), access_token.make_token):
        with pytest.raises(ConfigError, match=f"the token file {mine} "):
            use()


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "ray://h:1", "h", "u:p@h:1", "", "auto", "h:x"])
def test_only_a_head_can_be_joined(mine, monkeypatch, address):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="is not HOST:PORT of a head, such as"):
        typer.main.get_command(join.app)(["join", address], standalone_mode=False)
    assert not mine.with_name("token.clusters").exists()


@pytest.mark.parametrize("options", [["--include-dashboard=0"], ["--include-dashboard", "False"], ["--temp-dir="]])
def test_options_are_judged_before_a_token_is_made(mine, monkeypatch, capsys, options):
    monkeypatch.setattr(join, "run_head", lambda *_: pytest.fail("Ray was started"))
    mine.unlink()
    with pytest.raises(ConfigError, match=options[0].partition("=")[0]):
        typer.main.get_command(join.app)(["up", *options], standalone_mode=False)
    assert not mine.exists()
    assert "token" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "words"),
    [("http://", "http:// names no host"), ("127.0.0.1:99999", "99999 is none (Port out of range 0-65535)"),
     ("http://[::1", "is none (Invalid IPv6 URL)"), (":8265", ":8265 names no host"), ("host:0", "host:0 has port 0")],
)  # fmt: skip
def test_what_is_no_address_is_told_before_a_token_is_looked_for(where, words):
    with pytest.raises(ConfigError) as refused:
        api_url(where)
    assert str(refused.value).startswith("the cluster's address ")
    assert words in str(refused.value)


def test_a_known_server_that_drops_connections_is_waited_for(mine, monkeypatch):
    """It is being restarted; a stranger is not waited for."""
    spy, health = Spy(), client._health
    errors: list[Exception] = []
    monkeypatch.setattr(client, "_health", lambda url: errors.pop(0) if errors else health(url))
    errors[:] = [ConnectionResetError("reset by peer"), ConnectionRefusedError("refused")]
    with pytest.raises(ConfigError, match="reset by peer"):
        api_url(spy.url)
    access_token.remember(spy.url)
    errors[:] = [ConnectionResetError("reset by peer"), ConnectionRefusedError("refused")]
    assert api_url(spy.url).where == spy.url
    assert errors == []

"""The access token of a Ray cluster: created for its owner's eyes only, reused, never printed.

Left to itself Ray starts a head that requires no token. Even with one, GCS and the agents listen on every interface: a
cluster belongs on a private network.

A token belongs to one cluster. The addresses that it was created for, and those the user has given, are listed in a
file beside it, like SSH's known_hosts; an address from a config file gets the token only if it is listed there.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import psutil

from configs import Config, ConfigError, mask
from configs.load import override
from configs.reading.parse import parse_json
from configs.sweep.definition import nested

ADDRESS = re.compile(
    r"(?:(https?)://(?:[^@/?#\s\\]*@)?)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?(/[^\s\\@?#]*)?"
)
LISTENING = "0A"
"""Of a socket's state in /proc/net/tcp."""
PATIENCE = 10.0
"""Seconds to wait for a cluster to say whether it requires a token."""
LONGEST_ANSWER = 2**16
"""Bytes read of its answer at most."""

Result = TypeVar("Result")


class Address(NamedTuple):
    """A cluster's address, and where it was given."""

    where: str
    """http(s)://host:port of a server, or host:port of a head."""
    by: Literal["command", "environment", "file", "found"]
    """command, environment: by the user; file: by whoever wrote it; found: by Ray's `auto`, among all users' processes.
    """


def in_config(where: str | None, overrides: Sequence[str] = ()) -> Address | None:
    """`cluster.address` of a config or sweep; it counts as the user's own if the overrides give the same address."""
    if not where:
        return None
    said: dict[str, Any] = {}
    override(said, overrides, Config, "cluster.address=HOST:6379")
    of_trials = said.get("set")
    trees = [said, nested(of_trials) if isinstance(of_trials, dict) else {}]
    named = [tree["cluster"].get("address") for tree in trees if isinstance(tree.get("cluster"), dict)]
    return Address(where, "command" if where in named else "file")


def in_environment(*names: str) -> Address | None:
    """The address in the first of these variables that is set; None if none is."""
    return next((Address(os.environ[name], "environment") for name in names if os.environ.get(name)), None)


def token_file() -> Path:
    """Where Ray looks for the token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def known_tokens() -> list[str]:
    """The tokens that this user has here, the one in use first."""
    found = [os.environ.get("RAY_AUTH_TOKEN", "")]
    for file in dict.fromkeys([token_file(), Path.home() / ".ray" / "auth_token"]):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found.append(file.read_text())
    return [token.strip() for token in found if token.strip()]


def proof_of(token: str, nonce: str, host: str, port: int) -> str:
    """What shows to whoever has sent a nonce that a server has the token.

    It names the address at which the server was asked, so that nobody who listens at another one can pass it on.
    """
    said = f"muster server at {host} {port}: {nonce}"
    return hmac.new(token.encode(), said.encode(), hashlib.sha256).hexdigest()


def make_token() -> Path:
    """Create the token file if there is none, readable by its owner only; Ray started here will require the token.

    Returns:
        The file.

    Raises:
        ConfigError: tokens are switched off, or the file is empty or cannot be created or read.
    """
    _refuse_open_mode()
    path = token_file()
    make_token_file(path, "RAY_AUTH_TOKEN_PATH")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    return path


def make_token_file(path: Path, variable: str) -> None:
    """Create a token file if there is none, readable by its owner only; an existing one is closed to others.

    Args:
        variable: environment variable that chooses the file.

    Raises:
        ConfigError: it is empty, or cannot be created or read.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        _check_file(path)
    except OSError as error:
        raise ConfigError(
            f"the token file {path} cannot be created ({error.strerror}): choose another with {variable}"
        ) from None


def use_token(address: Address) -> None:
    """Have Ray present the token to a cluster; it does not look for one by itself when it joins by address.

    Raises:
        ConfigError: there is no token, tokens are switched off, the file cannot be closed to other users or read, or
            the token is not known to be for this address.
    """
    _refuse_open_mode()
    if not os.environ.get("RAY_AUTH_TOKEN"):
        if not os.path.lexists(token_file()):
            raise ConfigError(
                f"no token for the cluster at {mask(address.where)}: copy its head's token (created by `muster "
                f"cluster up`) to {token_file()}, or set RAY_AUTH_TOKEN_PATH to its file"
            )
        _check_file(token_file())
    _refuse_strange(address)
    os.environ["RAY_AUTH_MODE"] = "token"


def _check_file(path: Path) -> None:
    """Close a token file to other users. Raises ConfigError if that fails, or if the file is empty."""
    try:
        found = path.stat()
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            path.chmod(0o600)
            print(f"muster: the token file {path} was open to other users: its mode is now 0600", file=sys.stderr)
        empty = not path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {path} must be a text file that only its owner can read: {error}") from None
    if empty:
        raise ConfigError(f"the token file {path} is empty: replace it with the token file of the cluster's head")


def remember(*addresses: str) -> None:
    """List addresses as those of the token's cluster, if the list can be written."""
    with contextlib.suppress(OSError):
        new = [line for line in map(_line, addresses) if line not in _known()]
        if new:
            _known_file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with open(os.open(_known_file(), flags, 0o600), "a") as file:
                file.write("".join(f"{line}\n" for line in new))


def _refuse_strange(address: Address) -> None:
    """Raise ConfigError if whoever wrote a file, or another user of this machine, would get the token."""
    where, known, listening = mask(address.where), is_known(address.where), _listeners(address.where)
    if address.by != "command" and (others := listening - {0, os.geteuid()}):
        raise ConfigError(
            f"{where}: another user of this machine (uid {min(others)}) listens there and would receive your token. If "
            f"it is your cluster, name it on the command line: --address {where}, or cluster.address={where}"
        )
    if not known and (address.by == "file" or (address.by == "found" and not listening)):
        raise ConfigError(
            f"{where} is an address from a file, and your token ({token_file()}) is not known to be for it: whoever "
            f"wrote the file would get it.\nIf it is your cluster, name it yourself once: --address {where}, or "
            f"cluster.address={where} on the command line (for a sweep set.cluster.address={where})"
        )


def is_known(where: str) -> bool:
    """Whether an address is remembered as one of the token's cluster."""
    return _line(where) in _known()


def _known_file() -> Path:
    return token_file().with_name(f"{token_file().name}.clusters")


def _known() -> set[str]:
    try:
        return set(_known_file().read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return set()


def _line(where: str) -> str:
    """A line of that list. It begins with the token's digest, since the token file may later hold another's token."""
    token = next(iter(known_tokens()), "")
    scheme, host, port, path = _parts(where)
    return f"{hashlib.sha256(token.encode()).hexdigest()} {scheme}{host}:{port}{path}"


def _parts(where: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path. Raises ConfigError if it is no address, or one that programs parse differently."""
    found = ADDRESS.fullmatch(where)
    if not found:
        raise ConfigError(f"{mask(where)!r} is not a cluster's address: should be http://HOST:8267 or HOST:6379")
    scheme, host, port, path = (part or "" for part in found.groups())
    usual = {"https": "443", "http": "80"}.get(scheme, "0")
    return f"{scheme}://" if scheme else "", host.lower(), int(port or usual), path.rstrip("/")


def _listeners(where: str) -> set[int]:
    """Ids of the users who listen at an address of this machine, as far as Linux tells; empty for other machines."""
    _, host, port, _ = _parts(where)
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)}
    except OSError:
        return set()
    wanted = {ipaddress.ip_address(str(each).partition("%")[0]) for each in found}
    own = {each.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for each in entries}
    if not any(ip.is_loopback or ip.is_unspecified or str(ip) in own for ip in wanted):
        return set()
    anywhere, users = any(ip.is_unspecified for ip in wanted), set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, user, *_ = line.split()
                address, _, at = local.partition(":")
                ip = _decoded(address)
                if state == LISTENING and int(at, 16) == port and (ip.is_unspecified or anywhere or ip in wanted):
                    users.add(int(user))
    return users


def _decoded(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address as in /proc/net/tcp: hexadecimal 32-bit words in host byte order."""
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    ip = ipaddress.ip_address(b"".join(words))
    return getattr(ip, "ipv4_mapped", None) or ip


def own_addresses(port: str | None, given: str | None = None) -> list[str]:
    """host:port for each address of this machine; empty if the port is unknown.

    Args:
        given: the one address to use beside loopback; None: all.
    """
    if not (port or "").isdigit() or port == "0":
        return []
    entries = [each for interface in psutil.net_if_addrs().values() for each in interface]
    found = [given] if given else [each.address for each in entries if each.family == socket.AF_INET]
    return [f"{host}:{port}" for host in dict.fromkeys(["127.0.0.1", "localhost", *found])]


def _refuse_open_mode() -> None:
    if (mode := os.environ.get("RAY_AUTH_MODE", "token").lower()) != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE={mode} makes a cluster on which anyone can run code: unset it, or set it to token"
        )


def is_open(url: str) -> bool:
    """Whether the job API at a URL requires no token; it tells anyone who asks.

    Raises:
        OSError: no such API answers there.
    """

    def ask() -> bytes:
        with urllib.request.urlopen(f"{url}/api/authentication_mode", timeout=PATIENCE) as answer:
            return bytes(answer.read(LONGEST_ANSWER))

    try:
        mode = parse_json(within(PATIENCE, ask))["authentication_mode"]
    except urllib.error.HTTPError as error:
        if error.code == 404:  # before Ray 2.60 there was no such question, and no token
            return True
        raise
    except (HTTPException, ValueError, KeyError, TypeError) as error:
        raise ConnectionError(f"it does not say whether it requires a token: {error}") from error
    if not isinstance(mode, str):
        raise ConnectionError("it does not say whether it requires a token")
    return mode != "token"


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """What a call returns or raises. Raises TimeoutError if it takes longer: a socket's own timeout is per read, and a
    server that sends a byte now and then never reaches it."""
    found: list[Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return found[0]


def refuse_open(url: str) -> None:
    """Refuse a cluster whose job API requires no token.

    Raises:
        ConfigError: it is open.
        OSError: no such API answers there.
    """
    if is_open(url):
        raise ConfigError(
            f"the cluster at {url} is open: anyone who reaches it can run code on it. Start it with "
            f"`muster cluster up`, or with RAY_AUTH_MODE=token and a token"
        )

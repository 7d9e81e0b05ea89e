"""Listening and serving an app with uvicorn, for the dashboard and for a cluster's server."""

import contextlib
import resource
import socket
from typing import Any

from configs import ConfigError
from configs.reading.parse import shortened

PORT = 8267
"""Default port of the dashboard and of a cluster's server."""
LOOPBACK = "127.0.0.1"
ANYWHERE = ("0.0.0.0", "::", "")
MOST_CONNECTIONS = 2000


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)  # so that a click on the link before the server is up waits
    except OSError as error:
        raise ConfigError(
            f"--host {shortened(host, 100)} --port {port}: cannot listen there ({error.strerror or error}); "
            "choose another --port, or 0 for any free one"
        ) from None
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """URL by which this machine reaches the server."""
    shown = LOOPBACK if host in ANYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def warn_of(host: str) -> None:
    """Print a warning if other machines can connect."""
    if host not in (LOOPBACK, "localhost", "::1"):
        print("other machines can connect, and the traffic is not encrypted: use a private network", flush=True)


def run(app: Any, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    import uvicorn  # takes a second, with the rest of the server

    _allow_files(2 * MOST_CONNECTIONS)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.changes.end()  # or it would wait for pages that listen, and then break off what they hear
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        limit_concurrency=MOST_CONNECTIONS,
        ws="none",
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it after a clean shutdown
        Server(config).run(sockets=[listening])


def _allow_files(wanted: int) -> None:
    """Let this process have so many open files, as far as it may: many systems give 1,024 to one that does not ask."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def names(host: str) -> list[str]:
    """Host names that a browser may use for a server that listens on an address."""
    if host not in ANYWHERE:
        return [f"[{host}]" if ":" in host else host]
    import psutil

    own = [
        each.address for entries in psutil.net_if_addrs().values() for each in entries if each.family == socket.AF_INET
    ]
    return [*own, socket.gethostname(), socket.getfqdn()]

"""`muster dashboard`: web pages that show the runs of this machine."""

import contextlib
import socket
from pathlib import Path
from typing import Annotated

import typer

from configs import ConfigError
from configs.reading.parse import shortened

from .runs import RUNS

PORT = 8267
ANYWHERE = ("0.0.0.0", "::", "")


def dashboard(
    root: Annotated[list[Path], typer.Option(help="Folder of runs (run.root); may be given several times.")] = [RUNS],  # noqa: B006
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = PORT,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on, by default this machine only.")] = (
        "127.0.0.1"
    ),
) -> None:
    """Serve a web page that shows runs, until Ctrl-C. Example: muster dashboard --root runs"""
    for each in root:
        if not each.is_dir():
            raise ConfigError(f"--root {shortened(each, 200)}: there is no such folder; `muster train` makes {RUNS}")
    import uvicorn  # takes a second, with the rest of the server

    from cluster.server.web.app import create_app
    from cluster.server.web.auth import read_token, token_file

    token = read_token()
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    shown = "127.0.0.1" if host in ANYWHERE else f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        create_app(root, token, _names(host)),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        limit_concurrency=2000,
        ws="none",
    )
    print(f"http://{shown}:{port}/login#{token}", flush=True)
    print(f"the link contains the access token of {token_file()}: keep it private. Ctrl-C ends the server", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print("other machines can connect, and the traffic is not encrypted: use a private network", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it after a clean shutdown
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
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


def _names(host: str) -> list[str]:
    """Host names that a browser may use for this server."""
    if host not in ANYWHERE:
        return [f"[{host}]" if ":" in host else host]
    import psutil

    own = [
        each.address for entries in psutil.net_if_addrs().values() for each in entries if each.family == socket.AF_INET
    ]
    return [*own, socket.gethostname(), socket.getfqdn()]

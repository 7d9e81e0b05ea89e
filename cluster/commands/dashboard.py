"""`muster dashboard`: web pages that show the runs of this machine."""

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs import ConfigError
from configs.reading.parse import shortened

from .runs import RUNS, find_run, run_folder, run_folders

PORT = 8267
ANYWHERE = ("0.0.0.0", "::", "")


def dashboard(
    root: Annotated[list[Path], typer.Option(help="Folder of runs (run.root); may be given several times.")] = [RUNS],  # noqa: B006
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = PORT,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on, by default this machine only.")] = (
        "127.0.0.1"
    ),
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="With --export: names of runs, or paths of their folders; all of them."
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Start no server: write the page of each RUN, with the end of its logs, and their comparison as HTML "
            "files that open by themselves.",
        ),
    ] = None,
) -> None:
    """Serve a web page that shows runs, until Ctrl-C. Example: muster dashboard --root runs"""
    for each in root:
        if not each.is_dir():
            raise ConfigError(f"--root {shortened(each, 200)}: there is no such folder; `muster train` makes {RUNS}")
    if export is not None:
        _export(export, runs or (), root)
        return
    if runs:
        raise ConfigError(f"{shortened(runs[0], 100)}: to write the page of a run, name a folder with --export DIR")
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


def _export(folder: Path, runs: Sequence[str], roots: Sequence[Path]) -> None:
    """Raises ConfigError if a run is not there, there are too many, or the files cannot be written."""
    from cluster.server.web.app import MOST_COMPARED
    from cluster.server.web.export.contents import opened
    from cluster.server.web.export.page import write_pages

    if runs:
        found = [
            next(filter(None, (find_run(run, root) for root in roots)), None) or run_folder(run, roots[0])
            for run in runs
        ]
    else:
        found = [each.resolve() for root in roots for each in run_folders(root)]
        if not found:
            raise ConfigError(f"--export: there is no run in {shortened(', '.join(map(str, roots)), 200)}")
    if len(found) > MOST_COMPARED:
        raise ConfigError(
            f"--export: {len(found):,} runs, and {MOST_COMPARED} can be compared on a page: name those RUNs"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_pages(opened(found), folder, print)
    except OSError as error:
        raise ConfigError(
            f"--export {shortened(folder, 200)}: it cannot be written ({error.strerror or error})"
        ) from None


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

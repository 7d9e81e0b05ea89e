"""`muster dashboard`: web pages of the runs on this machine; `muster cluster serve`: a cluster's queue as well."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.gangs.access_token import Address, known_tokens, own_addresses, remember, token_file, use_token
from cluster.server import serving
from cluster.server.serving import LOOPBACK, PORT
from configs import ConfigError, mask
from configs.reading.parse import is_file, shortened

from .runs import RUNS, find_run, run_folder, run_folders

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")]
Host = Annotated[
    str, typer.Option(metavar="NAME", help="Address to listen on; by default only this machine can connect.")
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="NAME", help="Another host name that browsers reach it by, such as a proxy's."),
]


def dashboard(
    root: Annotated[list[Path], typer.Option(help="Folder of runs (run.root); may be given several times.")] = [RUNS],  # noqa: B006
    port: Port = PORT,
    host: Host = LOOPBACK,
    name: Names = None,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="With --export: names of runs or sweeps, or paths of their folders; by default all runs.",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Instead of serving, write HTML files that open without a server: a page for each RUN, with the end "
            "of its logs, and one that compares them all.",
        ),
    ] = None,
) -> None:
    """Serve a web page that shows runs, until Ctrl-C. Example: muster dashboard --root runs"""
    _check_roots(root)
    if export is not None:
        _export(export, runs or (), root)
        return
    if runs:
        raise ConfigError(f"{shortened(runs[0], 100)}: to write the page of a run, name a folder with --export DIR")
    from cluster.server.web import auth
    from cluster.server.web.app import create_app  # takes a second

    token = auth.read_token()
    listening = serving.listen(host, port)
    print(f"{serving.url_of(host, listening)}/login#{token}", flush=True)
    print(
        f"the link contains the access token of {auth.token_file()}: keep it private. Ctrl-C stops the server",
        flush=True,
    )
    serving.warn_of(host)
    serving.run(create_app(root, token, [*serving.names(host), *(name or ())]), listening)


def serve(
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Address of the Ray head that runs on this machine.")
    ] = "127.0.0.1:6379",
    root: Annotated[list[Path], typer.Option(help="Folder of runs (run.root); may be given several times.")] = [],  # noqa: B006
    port: Port = PORT,
    host: Host = LOOPBACK,
    name: Names = None,
) -> None:
    """Run a cluster's server on its head: the queue and the dashboard. Example: muster cluster serve --root /runs"""
    if not re.fullmatch(r"[^/@]+:\d+", address):
        raise ConfigError(f"--address {mask(address)!r} is not HOST:PORT of a head, such as 127.0.0.1:6379")
    _check_roots(root)
    use_token(Address(address, "command"))
    from cluster.server.jobs.board import Board
    from cluster.server.jobs.job_queue import JobQueue, locked, queue_folder
    from cluster.server.jobs.ray_link import RayLink
    from cluster.server.jobs.scheduler import Scheduler
    from cluster.server.web.app import create_app

    here = queue_folder(address)
    listening = serving.listen(host, port)
    with locked(here):
        queue = JobQueue(here)
        board = Board(queue, Scheduler(queue, RayLink(address, here)))
        url = serving.url_of(host, listening)
        own = own_addresses(url.rpartition(":")[2])
        remember(*own, *(f"http://{each}" for each in own))
        print(f"the cluster's server: {url} (log in with the token in {token_file()})", flush=True)
        serving.warn_of(host)
        token = known_tokens()[0]
        serving.run(create_app(root, token, [*serving.names(host), *(name or ())], board), listening)


def _check_roots(roots: Sequence[Path]) -> None:
    for each in roots:
        if not each.is_dir():
            raise ConfigError(f"--root {shortened(each, 200)}: no such folder; `muster train` creates {RUNS}")


def _export(folder: Path, runs: Sequence[str], roots: Sequence[Path]) -> None:
    """Raises ConfigError if a run is not there, there are too many, or the files cannot be written."""
    from cluster.server.web.app import MOST_COMPARED
    from cluster.server.web.export.contents import opened
    from cluster.server.web.export.page import write_pages
    from cluster.sweep.train.progress import PLAN

    found, sweeps = [], []
    for run in runs:
        sweep = next((each for root in roots for each in (root / run, Path(run)) if is_file(each / PLAN)), None)
        if sweep:
            sweeps.append(sweep.resolve())
        else:
            found.append(next(filter(None, (find_run(run, root) for root in roots)), None) or run_folder(run, roots[0]))
    if not runs:
        found = [each.resolve() for root in roots for each in run_folders(root)]
        if not found:
            raise ConfigError(f"--export: there are no runs in {shortened(', '.join(map(str, roots)), 200)}")
    if len(found) > MOST_COMPARED:
        raise ConfigError(
            f"--export: there are {len(found):,} runs, and a page compares at most {MOST_COMPARED}: "
            "name the RUNs to write"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_pages(opened(found), folder, print, sweeps)
    except OSError as error:
        raise ConfigError(
            f"--export {shortened(folder, 200)}: it cannot be written ({error.strerror or error})"
        ) from None

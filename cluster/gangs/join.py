"""`muster cluster`: a machine of a cluster that asks for a token, in the foreground, by Ray's own `ray start`.

The head's has the cluster's server beside it.
"""

import errno
import os
import re
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.server.serving import LOOPBACK, PORT
from configs import ConfigError, mask
from configs.reading.parse import shortened

from .access_token import Address, make_token, own_addresses, remember, use_token
from .head import run_head
from .ray_folder import ray_folder, remove_dead_sessions
from .session import check_reachable

RAY_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
NO = ("false", "f", "no", "n", "off", "0")
"""As `ray start` reads them."""

app = typer.Typer(help="Start or join a token-protected Ray cluster.", no_args_is_help=True)


@app.command(context_settings=RAY_OPTIONS)
def up(
    options: typer.Context,
    dashboard_host: Annotated[
        str, typer.Option(help="Address that Ray's own dashboard and job API listen on.")
    ] = LOOPBACK,
    server_host: Annotated[str, typer.Option(help="Address that the cluster's server listens on.")] = (LOOPBACK),
    server_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the cluster's server.")] = PORT,
    root: Annotated[
        list[Path], typer.Option(help="Folder of runs that its dashboard shows; may be given several times.")
    ] = [],  # noqa: B006
) -> None:
    """Run the head node until Ctrl-C; passes other options to `ray start`. Example: muster cluster up --port 6379"""
    given = _checked(options.args)
    gcs_port, api_port = _option(given, "--port", "6379"), _option(given, "--dashboard-port", "8265")
    if gcs_port == "0":  # any that is free: the server has to be told which
        with socket.create_server(("", 0)) as probe:
            gcs_port = str(probe.getsockname()[1])
        given = [*_without("--port", given)[0], f"--port={gcs_port}"]
    _refuse_taken("--port", gcs_port, "")
    _refuse_taken("--dashboard-port", api_port, dashboard_host)
    _refuse_taken("--server-port", str(server_port), server_host)
    for folder in root:
        if not folder.is_dir():
            raise ConfigError(f"--root {shortened(folder, 200)}: there is no such folder")
    token = make_token()
    ip = _option(given, "--node-ip-address")
    remember(*own_addresses(gcs_port, ip))
    for port in (api_port, str(server_port)):
        remember(*own_addresses(port, ip), *(f"http://{address}" for address in own_addresses(port, ip)))
    print(f"token of this cluster: {token} (give every machine and every user of it a copy)", flush=True)
    ray = _ray_command("--head", f"--dashboard-host={dashboard_host}", *given)
    serve = [f"--address={ip or LOOPBACK}:{gcs_port}", f"--host={server_host}", f"--port={server_port}"]
    serve += [f"--root={folder}" for folder in root]
    raise typer.Exit(run_head(ray, [sys.executable, "-P", "-m", "cluster.cli", "cluster", "serve", *serve]))


@app.command(context_settings=RAY_OPTIONS)
def join(
    options: typer.Context, address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Address of the head.")]
) -> None:
    """Join this machine to a cluster until Ctrl-C. Example: muster cluster join 10.0.0.1:6379"""
    if not re.fullmatch(r"[^/@]+:\d+", address):
        raise ConfigError(
            f"{mask(address)!r} is not HOST:PORT of a head, such as 10.0.0.1:6379 (8267 is the port of its server)"
        )
    given = _checked(options.args)
    use_token(Address(address, "command"))
    try:
        check_reachable(address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{address}: no head of a cluster answers there ({error}); HOST:PORT is its --port") from None
    remember(address)
    command = _ray_command(f"--address={address}", *given)
    os.execv(command[0], command)


def _option(arguments: list[str], name: str, default: str | None = None) -> str | None:
    """The value of one of `ray start`'s options."""
    return _without(name, arguments)[1] or default


def _refuse_taken(option: str, port: str | None, host: str) -> None:
    """Raise ConfigError if another process listens where Ray is to listen, which it would say in a traceback."""
    if not port or not port.isdigit() or not 0 < int(port) < 2**16:
        return  # any that is free, or for `ray start` to refuse
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return
            why = os.strerror(error.errno).lower()
            raise ConfigError(
                f"{option} {port} is in use ({why}), perhaps by a cluster that is up already: stop what listens there, "
                f"or take another port: `muster cluster up {option} {int(port) + 1}`"
            ) from None


def _checked(given: list[str]) -> list[str]:
    """Options for `ray start`, with the folder that its files go to. Raises ConfigError for those that cannot be."""
    options, folder = _without("--temp-dir", given)
    if (_option(options, "--include-dashboard") or "").lower() in NO:
        raise ConfigError("--include-dashboard=false: the job API is part of the dashboard")
    # Ray makes its folders writable by everyone, and runs what it unpacks there.
    return [*options, f"--temp-dir={ray_folder(folder)}"]


def _ray_command(*options: str) -> list[str]:
    """`ray start`, with all made ready that it finds around it."""
    os.umask(0o077)
    remove_dead_sessions(Path(_option(list(options), "--temp-dir") or ""))
    # Jobs are started as `muster ...`: the one that belongs to this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONSAFEPATH"] = "1"  # Ray runs `python -m`, which would import what lies in this folder
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    return [*command, *options]


def _without(option: str, given: list[str]) -> tuple[list[str], str | None]:
    """Arguments less an option, and the value that it has there."""
    value, kept, rest = None, [], iter(given)
    for argument in rest:
        name, equals, text = argument.partition("=")
        if name == option:
            value = text if equals else next(rest, "")
        else:
            kept.append(argument)
    return kept, value

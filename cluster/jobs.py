"""`muster jobs`, `status`, `logs`, `stop`, `retry`: runs as the cluster knows them."""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from configs import ConfigError, mask
from trainer.terminal import Console

from . import runs
from .client import Cluster, api_url
from .queue import ACTIVE, FINISHED, QUEUED, RUNNING, STOPPED
from .runs import RUNS, Json, Root, ago

PREFIX = "job-"
"""Of every job's id, which tells it from a run's name."""

Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `muster jobs` lists it.")]
Address = Annotated[str | None, typer.Option(metavar="URL", help="Job API of the cluster, such as http://HOST:8265.")]


def jobs(address: Address = None, as_json: Json = False) -> None:
    """List the jobs of a cluster. Example: muster jobs --address http://127.0.0.1:8265"""
    cluster = Cluster(api_url(address))
    found = cluster.jobs()
    if as_json:
        print(json.dumps(list(found.values()), indent=1))
        return
    if not found:
        print(f"no jobs at {mask(cluster.url)}")
        return
    table = Table("job", "state", box=None, pad_edge=False)
    for column in ("priority", "processes", "submitted"):
        table.add_column(column, justify="right")
    table.add_column("run")
    for id, job in found.items():
        numbers = (str(job["priority"]), _gang(job), ago(job["submitted"]))
        table.add_row(id, _state(job), *numbers, str(job["name"]))
    console = Console()
    console.print(table, soft_wrap=not console.is_terminal)


def status(
    run: Annotated[str, typer.Argument(metavar="RUN or JOB", help="Name or folder of a run, or id of a job.")],
    root: Root = RUNS,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """How a run or a job stands, and where a run's time went. Example: muster status quickstart"""
    if not run.startswith(PREFIX) or (root / run).is_dir() or Path(run).is_dir():
        runs.status(run, root, as_json)
        return
    found = Cluster(api_url(address)).jobs()
    job = _known(found, run)
    place = (-job["priority"], job["submitted"])
    waiting = [other for other in found.values() if other["state"] == job["state"] == QUEUED]
    ahead = sum((-other["priority"], other["submitted"]) < place for other in waiting)
    if as_json:
        print(json.dumps(job | {"ahead": ahead}, indent=1))
        return
    reason = f" ({job['reason']})" if job.get("reason") else ""
    where = f", {ahead} before it" if job["state"] == QUEUED else ""
    print(f"{run}: {_state(job)}{reason}{where}, priority {job['priority']}, {_gang(job)}, run {job['run_dir']}")
    if (Path(job["run_dir"]) / "config.yaml").is_file():
        runs.status(job["run_dir"], root, as_json=False)
    elif (Path(job["run_dir"]) / "plan.json").is_file():
        from .sweep.show_status import show

        show(Path(job["run_dir"]))


def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Output of one process, from the run's folder.")] = None,
    address: Address = None,
) -> None:
    """Print a job's output. Example: muster logs job-moe-3f9a1c --follow"""
    cluster = Cluster(api_url(address))
    if rank is not None:
        for text in _rank_output(cluster, job, rank, follow):
            print(text, end="", flush=True)
        return
    if follow:
        _show_output(cluster, job)
        return
    state = _known(cluster.jobs(), job)["state"]
    if (output := _output(cluster, job)) is None:
        print(f"{job} has no output on this cluster: it is {state}")
    else:
        print(output, end="")


def stop(
    job: Job,
    now: Annotated[bool, typer.Option("--now", help="Without a checkpoint.")] = False,
    address: Address = None,
) -> None:
    """Stop a job, after a checkpoint. Example: muster stop job-moe-3f9a1c"""
    cluster = Cluster(api_url(address))
    state = _known(cluster.jobs(), job)["state"]
    if state not in ACTIVE:
        print(f"{job} is {state} already")
        return
    cluster.send(do="stop", id=job, now=now)
    cluster.wait_for(job, lambda found: found["state"] not in ACTIVE or "stopping" in found)
    while (found := cluster.jobs()[job])["state"] in ACTIVE:
        time.sleep(0.5)
    again = f": `muster retry {job}` goes on" if found["state"] == STOPPED else ""
    print(f"{job} is {found['state']}{again}")


def retry(job: Job, address: Address = None, as_json: Json = False) -> None:
    """Submit an ended job once more; its run goes on from its last checkpoint. Example: muster retry job-moe-3f9a1c"""
    cluster = Cluster(api_url(address))
    old = _known(cluster.jobs(), job)
    if old["state"] in ACTIVE:
        raise ConfigError(f"{job} is {old['state']}: stop it first")
    if old["state"] == FINISHED:
        raise ConfigError(f"{job} is FINISHED: submit it with more to do, such as train.steps, to go on")
    new = new_id(old["name"])
    cluster.send(do="retry", id=job, new=new)
    accepted(cluster, new, as_json)


def new_id(name: str) -> str:
    """Id of a new job of a run."""
    return f"{PREFIX}{name[:180]}-{secrets.token_hex(3)}"


def accepted(cluster: Cluster, id: str, as_json: bool) -> None:
    """Wait until the queue has a job on its disk, and say where to look."""
    job = cluster.wait_for(id, lambda _: True)
    if as_json:
        print(json.dumps(job | {"address": mask(cluster.url)}, indent=1))
        return
    print(f"{id}\nrun {job['run_dir']}, {_gang(job)}, priority {job['priority']}")
    print(f"muster logs {id} --follow; muster status {id}; muster stop {id}; dashboard {mask(cluster.url)}")


def _known(jobs: dict[str, dict[str, Any]], id: str) -> dict[str, Any]:
    if id not in jobs:
        last = ", ".join(list(jobs)[-5:]) or "none"
        raise ConfigError(f"no job {id!r} on this cluster; the last are: {last}")
    return jobs[id]


def _state(job: dict[str, Any]) -> str:
    return "STOPPING" if job["state"] == RUNNING and "stopping" in job else str(job["state"])


def _gang(job: dict[str, Any]) -> str:
    gpus = f", {job['gpus']:g} GPU" if job["gpus"] else ""
    elastic = f" to {_most(job)}" if _most(job) > job["workers"] else ""
    return f"{job['workers']}{elastic} x ({job['cpus']:g} CPU{gpus})"


def _most(job: dict[str, Any]) -> int:
    """Processes that a job may have; journals of before did not tell."""
    return int(job.get("most", job["workers"]))


def _output(cluster: Cluster, id: str) -> str | None:
    """Of the job's driver; None: it has not started, or on a cluster that is gone."""
    try:
        return str(cluster.jobs_api.get_job_logs(id))
    except RuntimeError as error:
        if "404" in str(error):
            return None
        raise


def _show_output(cluster: Cluster, id: str) -> None:
    """Print what the job's driver writes until it ends."""
    job = _known(cluster.jobs(), id)
    if job["state"] == QUEUED:
        print(f"{id} waits in the queue", flush=True)
        job = _until(cluster, id, lambda job: job["state"] != QUEUED)
    if _output(cluster, id) is None:
        print(f"{id} has no output on this cluster: it is {job['state']}")
        return

    async def tail() -> None:
        async for text in cluster.jobs_api.tail_job_logs(id):
            print(text, end="", flush=True)

    asyncio.run(tail())


def follow(cluster: Cluster, id: str) -> None:
    """Print a job's output, and end with its exit code."""
    try:
        _show_output(cluster, id)
        job = _until(cluster, id, lambda job: job["state"] not in ACTIVE)
    except KeyboardInterrupt:
        print(f"\n{id} goes on without this command; `muster stop {id}` stops it")
        raise typer.Exit(130) from None
    codes = {FINISHED: 0, STOPPED: 75}
    raise typer.Exit(codes.get(job["state"], job.get("exit_code") or 1))


def _until(cluster: Cluster, id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while not reached(job := cluster.jobs()[id]):
        time.sleep(0.5)
    return job


def _rank_output(cluster: Cluster, id: str, rank: int, follow: bool) -> Iterator[str]:
    """What one process of the newest attempt wrote into the run's folder, piece by piece."""
    job = _known(cluster.jobs(), id)
    if not 0 <= rank < _most(job):
        raise ConfigError(f"--rank {rank}: {id} has ranks 0 to {_most(job) - 1}")
    folder, done = Path(job["run_dir"]) / "logs", 0
    shown: Path | None = None
    while True:
        ended = _known(cluster.jobs(), id)["state"] not in ACTIVE
        written = folder.glob(f"attempt-*-rank-{rank:04d}*")
        newest = max(written, key=lambda path: int(path.name.split("-")[1]), default=None)
        if newest is not None:
            done = done if newest == shown else 0
            shown = newest
            with newest.open(errors="replace") as file:
                file.seek(done)
                yield file.read()
                done = file.tell()
        if not follow or ended:
            break
        time.sleep(0.5)
    if shown is None:
        raise ConfigError(
            f"no output of rank {rank} in {folder}: processes write it there, and this machine must reach the folder; "
            f"without --rank it is what the job's driver wrote"
        )

"""Commands about the jobs of a cluster: `muster jobs`, `status`, `logs`, `stop`, `retry`, `priority`."""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.server.client import WAIT, Cluster, api_url
from cluster.server.messages import Known
from cluster.server.outlook import Outlook, gang_words
from cluster.server.waiting import ACTIVE, FINISHED, QUEUED, RUNNING, STOPPED
from configs import ConfigError, ExitCode, counted, mask
from configs.reading.parse import clip, shortened
from configs.units import ago, duration
from trainer.processes.output import LOGS
from trainer.record.lines import in_use, read_events, status_of
from trainer.record.terminal import Console

from . import runs
from .listing import show
from .runs import RUNS, SHOWN, Json, Root, complete_run

PREFIX = "job-"
"""Of every job's id, which tells it from a run's name."""

Job = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="Id of a job, as listed by `muster jobs`, or the name of its run (its newest job)."
    ),
]
RunOrJob = Annotated[
    str,
    typer.Argument(
        metavar="RUN or JOB", help="Name, MLflow id or folder of a run, or id of a job.", autocompletion=complete_run
    ),
]
WATCH_EVERY = 3.0
"""Seconds between two looks."""
UNSETTLED = 10.0
"""Seconds for which a server that has just started may not know whether a job is running."""
RESTARTS = 15.0
"""Seconds in which a run that failed may have begun again."""
Address = Annotated[str | None, typer.Option(metavar="URL", help="Server of the cluster, such as http://HOST:8267.")]


def jobs(
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """List a cluster's jobs, and why they wait or failed. Example: muster jobs --address http://127.0.0.1:8267"""
    cluster = Cluster(api_url(address))
    console = Console()
    before: list[list[str]] | None = None
    while True:
        try:
            rows = _look(cluster, as_json)
        except ConfigError as error:
            if not watch:
                raise
            console.print(f"{mask(cluster.url)} does not answer: {clip(mask(str(error)), SHOWN)}", soft_wrap=True)
        else:
            if watch and console.is_terminal and not as_json:
                console.clear()
                console.print(f"{mask(cluster.url)}  {time.strftime('%H:%M:%S')}  (Ctrl-C ends this list, no job)")
            if not as_json and (rows != before or console.is_terminal):
                _print_jobs(console, rows, cluster.url)
            before = rows
        if not watch:
            return
        time.sleep(WATCH_EVERY)


def _look(cluster: Cluster, as_json: bool) -> list[list[str]]:
    """The rows of the list; as JSON they are printed."""
    found = cluster.board()
    if as_json:
        rows = [job.entry() | {"outlook": seen._asdict()} for job, seen in found.values()]
        print(json.dumps(rows, indent=1), flush=True)
    return [_row(id, job, seen) for id, (job, seen) in found.items()]


def _print_jobs(console: Console, rows: list[list[str]], url: str) -> None:
    if rows:
        show(console, ("job", "state", "step", "eta", "priority", "processes", "submitted", "run", "why"), rows)
    else:
        console.print(f"no jobs at {mask(url)}")


def _row(id: str, job: Known, seen: Outlook) -> list[str]:
    return [
        id, _state(job), _step(seen), "" if seen.eta is None else duration(seen.eta), str(job.priority),
        gang_words(job), ago(job.submitted), job.name, clip(seen.why, SHOWN),
    ]  # fmt: skip


def _step(seen: Outlook) -> str:
    return "" if seen.step is None else f"{seen.step:,}/{seen.steps or 0:,}"


def status(
    run: RunOrJob,
    root: Root = RUNS,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Show a run's or job's status, and where its time went. Example: muster status quickstart"""
    named = _local_or_cluster(run, root, address)
    if isinstance(named, Path):
        runs.status(run, root, as_json)
        return
    job, seen, ahead = named.job(_known(named.jobs(), run).id)
    if as_json:
        print(json.dumps(job.entry() | {"ahead": ahead, "outlook": seen._asdict()}, indent=1))
        return
    why = f" ({seen.why})" if seen.why else ""
    far = f", step {_step(seen)}" if seen.step is not None else ""
    far += f", eta {duration(seen.eta)}" if seen.eta is not None else ""
    print(f"{job.id}: {_state(job)}{why}{far}, priority {job.priority}, {gang_words(job)}, run {job.run_dir}")
    if (Path(job.run_dir) / "config.yaml").is_file():
        runs.status(job.run_dir, root, as_json=False)
    elif (Path(job.run_dir) / "plan.json").is_file():
        from cluster.sweep.train.display import show as show_sweep

        show_sweep(Path(job.run_dir))


def logs(
    run: RunOrJob,
    follow: Annotated[bool, typer.Option("--follow", help="Follow the output until it ends.")] = False,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Output of one rank, from the run's folder.")] = None,
    root: Root = RUNS,
    address: Address = None,
) -> None:
    """Print the output of a run's newest attempt (of rank 0), or of a job. Example: muster logs quickstart --follow"""
    named = _local_or_cluster(run, root, address)
    if isinstance(named, Path):
        for text in _rank_output(named, rank or 0, follow, lambda: _has_ended(named)):
            print(text, end="", flush=True)
        return
    cluster = named
    job = _known(cluster.jobs(), run)
    id = job.id
    if rank is not None:
        if not 0 <= rank < job.most:
            raise ConfigError(f"--rank {rank}: {id} has ranks 0 to {job.most - 1}")
        ended = lambda: _known(cluster.jobs(), id).state not in ACTIVE  # noqa: E731
        for text in _rank_output(Path(job.run_dir), rank, follow, ended):
            print(text, end="", flush=True)
        return
    _show_output(cluster, id, follow)


def stop(
    job: Job,
    now: Annotated[bool, typer.Option("--now", help="Do not write a checkpoint first.")] = False,
    address: Address = None,
) -> None:
    """Stop a job, after a checkpoint. Example: muster stop job-moe-3f9a1c"""
    cluster = Cluster(api_url(address))
    known = _known(cluster.jobs(), job)
    job, state = known.id, known.state
    if state not in ACTIVE:
        print(f"{job} is {state} already")
        return
    found, until = cluster.stop(job, now), time.monotonic() + UNSETTLED
    while found.state in ACTIVE:
        if found.state == QUEUED and time.monotonic() > until:
            print(f"{job} is {found.state}: it will be cancelled or stopped as soon as the server reaches Ray")
            return
        time.sleep(0.5)
        found, _, _ = cluster.job(job)
    again = f": `muster retry {job}` continues it" if found.state == STOPPED else ""
    print(f"{job} is {found.state}{again}")


def priority(
    job: Job,
    priority: Annotated[int, typer.Argument(metavar="N", help="Jobs of higher priority go first.")],
    address: Address = None,
) -> None:
    """Change the priority of a waiting job. Example: muster priority job-moe-3f9a1c 5"""
    cluster = Cluster(api_url(address))
    changed = cluster.set_priority(_known(cluster.jobs(), job).id, priority)
    _, _, ahead = cluster.job(changed.id)
    print(f"{changed.id} has priority {changed.priority}, {counted(ahead, 'job')} ahead of it")


def retry(job: Job, address: Address = None, as_json: Json = False) -> None:
    """Resubmit a job that has ended; its run resumes from its last checkpoint. Example: muster retry job-moe-3f9a1c"""
    cluster = Cluster(api_url(address))
    old = _known(cluster.jobs(), job)
    job = old.id
    if old.state in ACTIVE:
        raise ConfigError(f"{job} is {old.state}: stop it first")
    if old.state == FINISHED:
        raise ConfigError(
            f"{job} is FINISHED: to continue it, submit it again with more to do, such as more train.steps"
        )
    accepted(cluster, cluster.retry(job, new_id(old.name)), as_json)


def new_id(name: str) -> str:
    """Id of a new job of a run."""
    return f"{PREFIX}{name[:180]}-{secrets.token_hex(3)}"


def accepted(cluster: Cluster, job: Known, as_json: bool) -> None:
    """Print where to find a job that the queue has accepted."""
    id = job.id
    if as_json:
        print(json.dumps(job.entry() | {"address": mask(cluster.url)}, indent=1))
        return
    print(f"{id}\nrun {job.run_dir}, {gang_words(job)}, priority {job.priority}")
    print(f"muster logs {id} --follow; muster status {id}; muster stop {id}; dashboard {mask(cluster.url)}")


def _local_or_cluster(run: str, root: Path, address: str | None) -> Path | Cluster:
    """The folder of a run that is here, else the cluster whose job is meant. Raises ConfigError: there is neither."""
    if folder := runs.find_run(run, root):
        return folder
    try:
        return Cluster(api_url(address))
    except ConfigError as error:
        if run.startswith(PREFIX):
            raise
        raise ConfigError(f"{runs.no_run(run, root)}\nIf it is a run of a cluster: {error}") from None


def _known(jobs: dict[str, Known], named: str) -> Known:
    """The job of this id, else the newest whose run has this name; Raises ConfigError, with the jobs there are."""
    if named in jobs:
        return jobs[named]
    if own := [job for job in jobs.values() if job.name == named]:
        return max(own, key=lambda job: (job.state in ACTIVE, job.submitted))
    last = ", ".join(list(jobs)[-5:]) or "none"
    raise ConfigError(f"no job or run {shortened(repr(named), 100)} on this cluster; the most recent are: {last}")


def _has_ended(run_dir: Path) -> bool:
    events = read_events(run_dir)
    status, _ = status_of(events)
    if status == "NEW":
        return not in_use(events)
    lately = bool(events) and time.time() - events[-1]["time"] < RESTARTS
    return status != "RUNNING" and not (status == "FAILED" and lately)


def _state(job: Known) -> str:
    return "STOPPING" if job.state == RUNNING and job.stopping else job.state


def _show_output(cluster: Cluster, id: str, follow: bool = True) -> None:
    """Print a job's output, with `follow` until it ends."""
    job, _, _ = cluster.job(id)
    if job.state == QUEUED and follow:
        print(f"{id} is waiting in the queue", flush=True)
    at, there = 0, False
    while True:
        piece = cluster.output(id, at, WAIT if follow else 0.0)
        print(piece.text, end="", flush=True)
        at, there = piece.next, there or piece.there
        if piece.ended or (not piece.text and not follow):
            break
    if not there:
        job, _, _ = cluster.job(id)
        print(f"{id} has no output on this cluster: it is {job.state}")


def follow(cluster: Cluster, id: str) -> None:
    """Print a job's output, and end with its exit code."""
    try:
        _show_output(cluster, id)
        job = _until_ended(cluster, id)
    except KeyboardInterrupt:
        print(f"\n{id} continues; `muster stop {id}` stops it")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    codes = {FINISHED: ExitCode.FINISHED, STOPPED: ExitCode.STOPPED}
    raise typer.Exit(codes.get(job.state, job.exit_code or ExitCode.FAILED))


def _until_ended(cluster: Cluster, id: str) -> Known:
    while (job := cluster.job(id)[0]).state in ACTIVE:
        time.sleep(0.5)
    return job


def _rank_output(run_dir: Path, rank: int, follow: bool, has_ended: Callable[[], bool]) -> Iterator[str]:
    """What one process of the newest attempt wrote into the run's folder, piece by piece."""
    folder, done = run_dir / LOGS, 0
    shown: Path | None = None
    while True:
        ended = has_ended()
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
        ranks = sorted({int(path.stem[-4:]) for path in folder.glob("attempt-*-rank-????.log")})
        several = f"there are ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ""
        there = f"; {several or f'there is only rank {ranks[0]}'}" if ranks else ""
        raise ConfigError(
            f"no output of rank {rank} in {folder}{there}. Each process writes its output there, and this machine "
            "must be able to read it"
        )

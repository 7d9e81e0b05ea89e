"""What a user wants to know about a job: its progress, and why it is queued or failed."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.gangs.share import Node
from configs import ConfigError, load, mask
from configs.reading.parse import clip, is_file
from configs.units import seconds_in
from trainer.record.lines import pace, read_events, summary

from .messages import Job, Known
from .waiting import QUEUED, RUNNING, STOPPED, Gang, assign, fits, gang_of


class Outlook(NamedTuple):
    """Progress and prospects of one job."""

    step: int | None = None
    """None if unknown."""
    steps: int | None = None
    eta: float | None = None
    """Seconds until it finishes."""
    why: str = ""
    """Why it is queued, failed, or not as requested."""


def gang_words(job: Job) -> str:
    """`2 to 4 x (2 CPU, 1 GPU)`."""
    gpus = f", {job.gpus:g} GPU" if job.gpus else ""
    elastic = f" to {job.most}" if job.most > job.workers else ""
    return f"{job.workers}{elastic} x ({job.cpus:g} CPU{gpus})"


def in_line(jobs: Mapping[str, Known]) -> list[str]:
    """Ids of the queued jobs, next to start first."""
    waiting = [(-job.priority, job.submitted, id) for id, job in jobs.items() if job.state == QUEUED]
    return [id for *_, id in sorted(waiting)]


def why_waiting(jobs: Mapping[str, Known], nodes: Sequence[Node]) -> dict[str, str]:
    """Why each queued job has not started.

    Args:
        nodes: total resources of each machine.
    """
    sizes, found, before = Counter(nodes), dict[str, str](), list[str]()
    running = [id for id, job in jobs.items() if job.state == RUNNING]
    for id in in_line(jobs):
        job = jobs[id]
        if not fits(gang_of(job), sizes):
            found[id] = f"no room even on an empty cluster: {gang_words(job)}; waits for machines to join"
            continue
        if before:
            found[id] = f"{len(before)} ahead of it: {_some(before)}"
        elif running:
            found[id] = f"waits for room for {gang_words(job)} beside {_some(running)}"
        else:
            found[id] = f"waits for room for {gang_words(job)}, or starts in a moment"
        before.append(id)
    return found


def probable_starts(jobs: Mapping[str, Known], left: Mapping[str, float], nodes: Sequence[Node]) -> dict[str, float]:
    """Seconds until queued jobs will start, if running jobs end as expected.

    Args:
        left: seconds until running jobs finish, where known.
        nodes: total resources of each machine.

    Returns:
        By job id, in the order of the queue, up to the first job for which it cannot be known.
    """
    free, held = list(nodes), list[tuple[float, dict[int, int], Gang]]()

    def give(places: Mapping[int, int], gang: Gang, sign: int) -> None:
        for index, workers in places.items():
            cpus, gpus = gang.each
            free[index] = Node(free[index].cpus + sign * workers * cpus, free[index].gpus + sign * workers * gpus)

    for id, job in jobs.items():
        if job.state == RUNNING:
            gang = gang_of(job)
            if (places := assign(gang, free, nodes)) is None:
                return {}  # it runs on machines that are not among these
            give(places, gang, -1)
            if id in left:
                held.append((left[id], places, gang))
    held.sort(key=lambda each: each[0])
    sizes, at, found = Counter(nodes), 0.0, dict[str, float]()
    for id in in_line(jobs):
        gang = gang_of(jobs[id])
        if not fits(gang, sizes):
            continue
        while (places := assign(gang, free, nodes)) is None:
            if not held:
                return found
            at, given_back, by = held.pop(0)
            give(given_back, by, 1)
        give(places, gang, -1)
        found[id] = at
    return found


def how_far(job: Job) -> Outlook:
    """Outlook of a running job from the folder of its run or sweep; empty if this machine cannot reach it."""
    run_dir = Path(job.run_dir)
    if is_file(run_dir / "config.yaml"):
        found, events = summary(run_dir), read_events(run_dir)
        steps = load(run_dir / "config.yaml").train.steps
        took = pace(run_dir)
        eta = None if took is None else took * max(steps - found["step"], 0)
        waits = events[-1].get("reason", "") if events and events[-1]["event"] == "waiting" else ""
        return Outlook(found["step"], steps, eta, f"waits {waits}" if waits else "")
    if is_file(run_dir / "plan.json"):
        from cluster.sweep.train.progress import progress  # numpy

        swept = progress(run_dir)
        return Outlook(swept.count("finished"), len(swept.items), swept.eta)
    return Outlook()


_LINE = re.compile(r"^step (\d{1,15})/(\d{1,15})  (.*)$", re.MULTILINE)


def told(output: str) -> Outlook:
    """Progress of a job, from the output of `muster train`."""
    lines = list(_LINE.finditer(output[-(1 << 16) :]))
    if not lines:
        return Outlook()
    step, steps, parts = lines[-1].groups()
    return Outlook(int(step), int(steps), seconds_in(parts.partition("  eta ")[2].partition("  ")[0]))


def last_words(output: str) -> str:
    """Why a command failed, in one line: its own message, or else the last line of its output."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    said = [i for i, line in enumerate(lines) if line.startswith("muster: ")]
    crashed = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if not lines or not said or (crashed and crashed[-1] > said[-1]):
        return clip(mask(lines[-1])) if lines else ""
    first = lines[said[-1]].removeprefix("muster: ")
    more: list[str] = []
    for line in lines[said[-1] + 1 :][:2]:
        if line.startswith((" ", "Output of the workers", "tracking: ")):
            break
        more.append(line)
    return clip(mask(" ".join([first, *more])), 600)


def why_ended(job: Known) -> str:
    """Why a job ended, if there is more to say than its state."""
    if job.reason:
        return job.reason
    if job.state == STOPPED:
        return "stopped at once" if job.stopping == "now" else "after a checkpoint"
    return ""


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:2]) + (f" and {len(ids) - 2} more" if len(ids) > 2 else "")


def outlook(
    jobs: Mapping[str, Known], nodes: Sequence[Node], running: Callable[[Known], Outlook]
) -> dict[str, Outlook]:
    """The outlook of every job.

    Args:
        nodes: total resources of each machine.
        running: called for the outlook of each job that runs, such as `running_outlook`.
    """
    waiting = why_waiting(jobs, nodes)
    found = {}
    for id, job in jobs.items():
        if job.state == QUEUED:
            found[id] = Outlook(why=waiting[id])
        elif job.state == RUNNING:
            each = running(job)
            found[id] = each._replace(why=_stopping(job) or each.why)
        else:
            found[id] = Outlook(why=why_ended(job))
    return found


def running_outlook(job: Known, output: Callable[[str], str]) -> Outlook:
    """The outlook of a running job, from its run's folder, or from its output where the folder cannot be reached.

    Args:
        output: called with the job's id; returns the end of what its driver printed.
    """
    try:
        each = how_far(job)
    except (ConfigError, OSError) as error:  # a folder that is being written, or is not a run's
        each = Outlook(why=clip(mask(str(error))))
    if each.step is None:
        each = each._replace(**{key: value for key, value in told(output(job.id))._asdict().items() if value})
    return each


def _stopping(job: Known) -> str:
    return "" if job.stopping is None else "stops at once" if job.stopping == "now" else "stops after a checkpoint"

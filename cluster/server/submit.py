"""`muster submit`: check a run, plan it for the cluster, and send it to the queue with the working directory.

`muster sweep submit` (sweep/train/submit.py) uses the functions below."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cluster.commands.jobs import Address, accepted, follow, new_id
from cluster.commands.runs import Json
from cluster.gangs.access_token import in_config
from cluster.gangs.share import Node, group_of, share_of_gang, share_of_most
from configs import Config, ConfigError, counted, load, preset_names, resolve, worker_counts
from configs.explain import first_reason
from configs.load import dump_yaml, model_source, one_file
from configs.sections.data import PACKAGED
from trainer.checkpoint.manifest import committed
from trainer.files.scratch import temporary_folder

from . import messages, pack
from .client import Cluster, api_url
from .waiting import ACTIVE

CONFIG, SWEEP = f"{pack.JOB}/run.yaml", f"{pack.JOB}/sweep.yaml"
"""Files of a job that hold its config, command-line overrides included. They have a folder to themselves: beside the
user's files, a preset named in `base` could be mistaken for a file of that name."""

Wait = Annotated[bool, typer.Option("--wait", help="Print the job's output, and exit with its exit code.")]
Queue = Annotated[bool, typer.Option("--queue", help="Queue it even if the cluster is too small now.")]
With = Annotated[
    list[str] | None, typer.Option("--with", metavar="FILE", help="Send FILE even if it is ignored or may be a secret.")
]
Priority = Annotated[int, typer.Option(metavar="N", help="Jobs of higher priority start first.")]


def submit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help=f"A preset ({', '.join(preset_names())}) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to set, such as train.steps=100.")
    ] = None,
    address: Address = None,
    wait: Wait = False,
    queue: Queue = False,
    priority: Priority = 0,
    insisted: With = None,
    as_json: Json = False,
) -> None:
    """Submit a run, with this folder, to a cluster. Example: muster submit moe.yaml run.root=/shared/runs"""
    from trainer.data.manifest import planned_vocabulary  # numpy

    asked = load(config, overrides or ())
    here = Path.cwd()
    check_root("run.root", asked.run.root)
    asked, _ = resolve(asked, vocab_size=planned_vocabulary(asked))
    check_workers(asked)
    cluster = Cluster(api_url(address, in_config(asked.cluster.address, overrides or ())))
    job = job_of_run(asked, cluster.nodes(), queue, priority)
    packed = pack.files(here, [Path(asked.run.root)], insisted or ())
    taken = model_source(config, overrides or ())
    check_sent(needs(asked) | {"model.from": [taken] if taken else []}, here, packed)
    file = dump_yaml(one_file(config, [*(overrides or ()), *kept_keys(job)]))
    send(cluster, here, packed, job, wait, as_json, {CONFIG: file})


def check_workers(asked: Config) -> None:
    """Raise ConfigError if a run asks for more processes than a job may have."""
    if (most := asked.parallel.world_size) > messages.MOST_WORKERS:
        raise ConfigError(
            f"the run asks for {counted(most, 'process')}, and a job has at most {messages.MOST_WORKERS}: lower "
            f"parallel.dp"
        )


def job_of_run(asked: Config, nodes: Sequence[Node], queue: bool, priority: int) -> messages.Job:
    """The job that trains a run whose config is the package's CONFIG.

    Args:
        asked: its resolved config; `run.root` is an absolute path.
        nodes: total resources of each machine of the cluster.
        queue: accept it even if it is too large for them.

    Raises:
        ConfigError: it is too large for the machines, or the queue would refuse it.
    """
    counts = worker_counts(asked)
    fewest = counts[-1]
    each = share_of_most(asked, lambda c: share_of_gang(c, nodes, wait=queue and c.parallel.world_size == fewest))
    return job_of(
        name=asked.run.name,
        run_dir=str(Path(asked.run.root) / asked.run.name),
        command=shlex.join(["muster", "train", CONFIG]),
        workers=fewest,  # it starts once this many fit, with as many more as there is room for
        most=counts[0],
        cpus=each.cpus,
        gpus=each.gpus,
        group=group_of(asked),
        priority=priority,
    )


def kept_keys(job: messages.Job) -> list[str]:
    """Overrides by which a run takes what its job has reserved, on the cluster that it is started on."""
    return ["cluster.address=null", f"cluster.cpus_per_worker={job.cpus:g}", f"cluster.gpus_per_worker={job.gpus:g}"]


def job_of(**values: Any) -> messages.Job:
    """A job in the form that the queue accepts. Raises ConfigError if the queue would refuse it."""
    try:
        return messages.Job.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"the queue would refuse this job: {first_reason(error)}") from None


def send(
    cluster: Cluster,
    here: Path,
    packed: list[Path],
    job: messages.Job,
    wait: bool,
    as_json: bool,
    more: Mapping[str, str],
) -> None:
    """Send a job and its files to the queue, and print where to find it.

    Args:
        more: text of additional files, by name.
        wait: print the job's output, and exit with its exit code.

    Raises:
        ConfigError: the run is already queued or running, or the files are too large.
    """
    check_new(job, cluster.jobs())
    pack.check_size(here, packed)
    id = new_id(job.name)
    message = messages.Submit(do="submit", id=id, job=job)
    with temporary_folder() as folder:
        path = folder / "job.zip"
        pack.write_zip(path, here, packed, message.model_dump_json(), more)
        sent = cluster.submit(path)
    accepted(cluster, sent, as_json)
    if wait:
        follow(cluster, id)


def check_new(job: messages.Job, jobs: Mapping[str, messages.Known]) -> None:
    """Raise ConfigError if a job of the same run is queued or running."""
    for id, other in jobs.items():
        if other.run_dir == job.run_dir and other.state in ACTIVE:
            raise ConfigError(f"{job.name} is already job {id} ({other.state}): stop it, or choose another name")


def check_root(key: str, root: str) -> None:
    """Raise ConfigError for a relative path, which would be in the job's temporary folder."""
    if not Path(root).is_absolute():
        raise ConfigError(
            f"{key}={root} is a relative path, which would be inside the job's temporary folder: name a folder that "
            f"every machine of the cluster can reach, such as {key}=/shared/runs"
        )


def path_in(here: Path, config: str) -> str:
    """Path of a sweep's base config, relative to the folder that is sent. Raises ConfigError if it is outside it."""
    if not Path(config).suffix and config in preset_names():
        return config
    path = Path(config).resolve()
    if not path.is_relative_to(here):
        raise ConfigError(
            f"{config} is not inside {here}, the folder that is sent to the cluster: run the command from a folder "
            "that contains it"
        )
    return str(path.relative_to(here))


def needs(config: Config) -> dict[str, list[str]]:
    """Files and folders that a run reads, by config key."""
    begun = committed(Path(config.run.root).expanduser() / config.run.name)  # if so, it resumes from its own checkpoint
    data = [config.data.path] if isinstance(config.data.path, str) else [each.path for each in config.data.path]
    return {
        "data.path": [path for path in data if path not in PACKAGED],
        "train.init_from": [config.train.init_from] if config.train.init_from and not begun else [],
        "plugins": [plugin for plugin in config.plugins if plugin.endswith(".py")],
    }


def check_sent(needed: Mapping[str, list[str]], here: Path, packed: list[Path]) -> None:
    """Raise ConfigError if a needed file is not among those that are sent."""
    for key, paths in needed.items():
        for path in paths:
            if os.path.isabs(os.path.expanduser(path)):
                continue
            inside = Path(os.path.normpath(path))
            if not any(file == inside or inside in file.parents for file in packed):
                raise ConfigError(
                    f"{key}={path} is not sent: it is not in {here}, .gitignore excludes it, or it looks like a "
                    f"secret. Give an absolute path that the cluster can reach, take it out of .gitignore, or send it "
                    f"with --with FILE"
                )

"""`muster sweep submit`: a sweep as a job of the cluster's queue, which starts it when its devices are free."""

import shlex
from pathlib import Path

from cluster.commands.jobs import Address
from cluster.commands.runs import Json
from cluster.gangs.access_token import in_config
from cluster.gangs.share import TO_WAIT, Share, capacity
from cluster.server import pack
from cluster.server.client import Cluster, api_url
from cluster.server.messages import MOST_WORKERS
from cluster.server.submit import (
    SWEEP,
    Priority,
    Queue,
    Wait,
    With,
    check_root,
    check_sent,
    job_of,
    needs,
    path_in,
    send,
)
from cluster.server.waiting import Gang, place
from configs import ConfigError, counted, preset_names
from configs.load import dump_yaml
from configs.sweep.definition import load_sweep, read_sweep

from .run_commands import File, Gpus, Overrides


def submit_sweep(
    file: File,
    overrides: Overrides = None,
    gpus: Gpus = None,
    address: Address = None,
    wait: Wait = False,
    queue: Queue = False,
    priority: Priority = 0,
    insisted: With = None,
    as_json: Json = False,
) -> None:
    """Submit a sweep, with this folder, to a cluster. Example: muster sweep submit sweep.yaml root=/shared"""
    from cluster.sweep.design.arms import arms
    from cluster.sweep.design.plan import plan
    from cluster.sweep.design.trial import gang_of
    from trainer.data.manifest import planned_vocabulary  # imports numpy

    from .trial_state import finished_losses

    sweep, here = load_sweep(file, overrides or ()), Path.cwd()
    check_root("root", sweep.root)
    every = arms(sweep)
    planned = plan(sweep, planned_vocabulary(every[0].config) or 0, finished_losses(sweep.folder))
    planned.check_gpus(gpus)
    if (widest := max(gpus or 0, planned.widest)) > MOST_WORKERS:
        raise ConfigError(
            f"--gpus {widest}: a job has at most {MOST_WORKERS} processes"
            if gpus
            else f"a trial takes {counted(widest, 'process')}, and a job has at most {MOST_WORKERS}: lower parallel.dp"
        )
    cluster = Cluster(api_url(address, in_config(every[0].config.cluster.address, overrides or ())))
    nodes = cluster.nodes()
    gangs = [gang_of(trial.resolved, nodes, wait=queue) for trial in planned.trials]
    each = Share(max(gang.each.cpus for gang in gangs), max(gang.each.gpus for gang in gangs))
    # It starts with --gpus devices, or with what its widest trial needs and then takes what is free.
    gang = Gang(gpus or planned.widest, each, max(gang.group for gang in gangs))
    room = int(sum(capacity(node, each) for node in nodes))
    if not queue and place(gang, nodes, nodes) is None:
        raise ConfigError(
            f"--gpus {gang.workers}: the cluster has room for {counted(room, 'process')} of "
            f"{counted(each.cpus, 'CPU')} and {counted(each.gpus, 'GPU')}: "
            f"lower it, or {TO_WAIT}"
        )

    packed = pack.files(here, [Path(sweep.root)], insisted or ())
    base = path_in(here, sweep.base)
    check_sent({"base": [] if base in preset_names() else [base]}, here, packed)
    for arm in every:
        check_sent(needs(arm.config), here, packed)
    limit = [f"--gpus={gpus}"] if gpus else []
    job = job_of(
        name=sweep.name,
        run_dir=str(sweep.folder),
        command=shlex.join(["muster", "sweep", "run", SWEEP, *limit]),
        workers=gang.workers,
        most=gpus or min(max(gang.workers, room), MOST_WORKERS),
        cpus=gang.each.cpus,
        gpus=gang.each.gpus,
        group=gang.group,
        priority=priority,
    )
    tree = read_sweep(file, [*(overrides or ()), "set.cluster.address=null"]) | {"base": base}
    send(cluster, here, packed, job, wait, as_json, {SWEEP: dump_yaml(tree)})

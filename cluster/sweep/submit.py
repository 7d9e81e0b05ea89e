"""`muster sweep submit`: a sweep as a job of the cluster's queue, which starts it when its devices are free."""

import shlex
from pathlib import Path

from configs import ConfigError, preset_names
from configs.sweep import SweepConfig
from trainer.data.manifest import vocabulary

from .. import pack
from ..client import Cluster, api_url
from ..queue import Gang, place
from ..share import Node, Share, capacity, group_of, share_of_most, share_of_trial
from ..submit import check_root, check_sent, needs, path_in, send
from .arms import arms
from .plan import plan
from .standing import finished_losses
from .trial import Plan


def submit(
    sweep: SweepConfig,
    file: str,
    overrides: list[str],
    gpus: int | None,
    address: str | None,
    wait: bool,
    queue: bool,
    priority: int,
    as_json: bool,
) -> None:
    """Send a sweep to a cluster.

    Args:
        file: that it was read from, with these overrides.
        gpus: devices that it starts with and never goes beyond; None: it starts with those of its widest trial, and
            takes what is free.
        queue: wait for machines to join where there are too few.

    Raises:
        ConfigError: found before anything is sent.
    """
    here = Path.cwd()
    check_root("root", sweep.root)
    name = path_in(here, file)
    every = arms(sweep)
    planned = plan(sweep, vocabulary(every[0].config.data), finished_losses(sweep.folder))
    planned.check_gpus(gpus)
    cluster = Cluster(api_url(address, every[0].config.cluster.address))
    nodes = cluster.nodes()
    gang = _gang(planned, gpus, nodes, queue)

    packed = pack.files(here, [Path(sweep.root)])
    base = [] if sweep.base in preset_names() else [path_in(here, sweep.base)]
    check_sent({"SWEEP.yaml": [name], "base": base}, here, packed)
    for arm in every:
        check_sent(needs(arm.config), here, packed)
    limit = [f"--gpus={gpus}"] if gpus else []
    job = {
        "name": sweep.name,
        "run_dir": str(sweep.folder),
        "command": shlex.join(["muster", "sweep", "run", name, *overrides, "set.cluster.address=null", *limit]),
        "workers": gang.workers,
        "most": gpus or max(gang.workers, int(sum(capacity(node, gang.each) for node in nodes))),
        "cpus": gang.each.cpus,
        "gpus": gang.each.gpus,
        "group": gang.group,
        "priority": priority,
    }
    send(cluster, here, packed, job, wait, as_json)


def _gang(planned: Plan, gpus: int | None, nodes: list[Node], queue: bool) -> Gang:
    """What must be free for the sweep to start. Raises ConfigError if the cluster has not so much."""
    shares, groups = [], [1]
    for config in {trial.name: trial.resolved for trial in planned.trials}.values():
        shares.append(share_of_most(config, lambda config: share_of_trial(config, nodes, wait=queue)))
        groups.append(group_of(config))
    each = Share(max(one.cpus for one in shares), max(one.gpus for one in shares))
    gang = Gang(gpus or planned.widest, each, max(groups))
    if not queue and place(gang, nodes, nodes) is None:
        room = int(sum(capacity(node, each) for node in nodes))
        raise ConfigError(
            f"--gpus {gpus}: the cluster has room for {room} processes of {each.cpus:g} CPUs and {each.gpus:g} GPUs: "
            f"lower it, or wait for machines to join with --queue"
        )
    return gang

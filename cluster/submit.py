"""`muster submit`: a run is checked, planned against the cluster, packed with its folder and left to the queue."""

import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from configs import Config, ConfigError, load, preset_names, resolve, worker_counts

from . import pack
from .client import Cluster, api_url
from .jobs import Address, accepted, follow, new_id
from .queue import ACTIVE
from .runs import Json
from .share import group_of, share_of_gang, share_of_most


def submit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help=f"A preset ({', '.join(preset_names())}) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to set, such as train.steps=100.")
    ] = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show its output, and end as it ends.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Wait for machines to join where there are too few.")] = False,
    priority: Annotated[int, typer.Option(metavar="N", help="The higher goes first.")] = 0,
    as_json: Json = False,
) -> None:
    """Send this folder and a run to a cluster. Example: muster submit moe.yaml run.root=/shared/runs"""
    from trainer.data.manifest import vocabulary  # numpy

    asked = load(config, overrides or ())
    here = Path.cwd()
    _check_root(asked)
    asked, _ = resolve(asked, vocab_size=vocabulary(asked.data))
    name = _config_in(here, config)
    cluster = Cluster(api_url(address, asked.cluster.address))
    counts, nodes = worker_counts(asked), cluster.nodes()
    fewest = counts[-1]
    each = share_of_most(asked, lambda c: share_of_gang(c, nodes, wait=queue and c.parallel.world_size == fewest))
    root = Path(asked.run.root)
    for id, job in cluster.jobs().items():
        if job["run_dir"] == str(root / asked.run.name) and job["state"] in ACTIVE:
            raise ConfigError(f"run.name={asked.run.name} is {id} ({job['state']}): stop it, or name another")

    packed = pack.files(here, [root])
    _check_sent(asked, here, packed, name)
    pack.check_size(here, packed)
    kept = ["cluster.address=null", f"cluster.cpus_per_worker={each.cpus:g}", f"cluster.gpus_per_worker={each.gpus:g}"]
    id = new_id(asked.run.name)
    job = {
        "name": asked.run.name,
        "run_dir": str(root / asked.run.name),
        "command": shlex.join(["muster", "train", name, *(overrides or ()), *kept]),
        "workers": fewest,  # it starts when so many fit, with as many more as there is room for
        "most": counts[0],
        "cpus": each.cpus,
        "gpus": each.gpus,
        "group": group_of(asked),
        "priority": priority,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.zip"
        pack.write_zip(path, here, packed, json.dumps({"do": "submit", "id": id, "job": job}))
        cluster.send_file(path)
    accepted(cluster, id, as_json)
    if wait:
        follow(cluster, id)


def _check_root(config: Config) -> None:
    if not Path(config.run.root).is_absolute():
        raise ConfigError(
            f"run.root={config.run.root} would lie in a temporary folder of the job: name a folder that every machine "
            f"of the cluster reaches, such as run.root=/shared/runs"
        )


def _config_in(here: Path, config: str) -> str:
    """CONFIG as the job names it, from its copy of this folder."""
    if not Path(config).suffix and config in preset_names():
        return config
    path = Path(config).resolve()
    if not path.is_relative_to(here):
        raise ConfigError(f"CONFIG {config} is not below {here}, which is what the cluster gets: start from above it")
    return str(path.relative_to(here))


def _check_sent(config: Config, here: Path, packed: list[Path], source: str) -> None:
    """Raise ConfigError if .gitignore leaves at home what the run needs."""
    data = [config.data.path] if isinstance(config.data.path, str) else [each.path for each in config.data.path]
    needs: dict[str, list[str | None]] = {
        "data.path": [path for path in data if path != "stdlib"],
        "train.init_from": [config.train.init_from],
        "plugins": [plugin for plugin in config.plugins if plugin.endswith(".py")],
        "CONFIG": [source] if source not in preset_names() else [],
    }
    for key, paths in needs.items():
        for path in paths:
            if path is None or os.path.isabs(os.path.expanduser(path)):
                continue
            inside = Path(os.path.normpath(path))
            if not any(file == inside or inside in file.parents for file in packed):
                raise ConfigError(
                    f"{key}={path} is not sent: it is not in {here}, or .gitignore names it. Give the absolute path of "
                    f"a place that the cluster reaches, or take it out of .gitignore"
                )

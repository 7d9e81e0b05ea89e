"""`muster sweep run` and `status`: train the trials, and show their progress."""

import json
from typing import Annotated, Any

import typer

from cluster.commands.runs import Json
from cluster.gangs.session import signals, stop_early
from configs.sweep.definition import load_sweep

File = Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="The sweep's definition.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values to set, such as isoflop.sizes=7.")
]
Gpus = Annotated[int | None, typer.Option(metavar="N", help="Number of devices to run trials on.")]


def run_sweep(file: File, overrides: Overrides = None, gpus: Gpus = None) -> None:
    """Train a sweep's trials, or resume them. Example: muster sweep run sweep.yaml --gpus 8"""
    sweep = load_sweep(file, overrides or ())
    with signals(stop_early):
        from .run import run_sweep

        raise typer.Exit(run_sweep(sweep, gpus, overrides or ()))


def status_of_sweep(file: File, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show a sweep's progress, and where its devices' time went. Example: muster sweep status sweep.yaml"""
    sweep = load_sweep(file, overrides or ())
    from .display import show
    from .progress import progress, to_json

    folder = sweep.folder.resolve()
    if as_json:
        print(strict_json(to_json(progress(folder))))
    else:
        show(folder)


def strict_json(tree: dict[str, Any]) -> str:
    """Indented JSON that every parser accepts: numbers that are not finite become null."""
    from trainer.files.plain_json import dump

    return json.dumps(json.loads(dump(tree)), indent=1)

"""`muster sweep`: its sub-commands."""

from typing import Annotated

import typer

from cluster.commands.plan import KINDS, asked_device
from cluster.commands.runs import Json
from configs import Config, ConfigError
from configs.sweep.definition import SweepConfig, load_sweep

from .results import fit_commands
from .train import run_commands, submit
from .train.run_commands import File, Gpus, Overrides

app = typer.Typer(help="Plan, run and fit scaling-law sweeps.", no_args_is_help=True)


@app.command("plan")
def plan_sweep(
    file: File,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option("--gpu", "--device", metavar="KIND", help=f"Kind of device: {', '.join(KINDS)}.")
    ] = "h100",
    gpus: Gpus = None,
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option(metavar="X", help="Price of one device-hour, in USD.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List a sweep's trials, their cost, and possible problems. Example: muster sweep plan sweep.yaml --gpu cpu"""
    device = asked_device(gpu, gpus, usd_per_gpu_hour)
    from trainer.data.manifest import planned_vocabulary

    from .design.plan import plan
    from .design.show import costs, show, to_json
    from .train.trial_state import finished_losses

    sweep = load_sweep(file, overrides or ())
    config = config_of(sweep)
    planned = plan(sweep, planned_vocabulary(config) or 0, finished_losses(sweep.folder))
    planned = planned._replace(warnings=planned.warnings + _repeats(config, planned.trials))
    planned.check_gpus(gpus)
    found = costs(planned, device, gpus, usd_per_gpu_hour)
    if as_json:
        print(run_commands.strict_json(to_json(planned, found)))
    else:
        show(planned, found)


def config_of(sweep: SweepConfig) -> Config:
    """The config of a sweep's base and set, which says where the data are."""
    from .design.arms import arms

    return arms(sweep)[0].config


def _repeats(config: Config, trials: tuple) -> tuple[str, ...]:
    from trainer.data.manifest import planned_vocabulary, read_manifests

    from .design.doubts import repeated

    if planned_vocabulary(config) is None:
        return ()
    try:
        manifests = read_manifests(config.data)
    except ConfigError:
        return ()  # not prepared yet
    return tuple(repeated(trials, sum(manifest.splits["train"].tokens for manifest in manifests)))


app.command("run")(run_commands.run_sweep)
app.command("submit")(submit.submit_sweep)
app.command("status")(run_commands.status_of_sweep)
app.command("fit")(fit_commands.fit_sweep)
app.command("predict")(fit_commands.predict_sweep)
app.command("plot")(fit_commands.plot_sweep)
app.command("next")(fit_commands.next_sweep)
app.command("score")(fit_commands.score_sweep)

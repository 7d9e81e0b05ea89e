"""The `muster` command: its sub-commands, and how errors become messages and exit codes.

Commands import heavy packages inside their functions: torch, Ray and MLflow take seconds, and `muster --help` must not.
"""

import errno
import json
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from configs import Config, ConfigError, ExitCode, counted, load, mask, preset_names, private_files, resolve, to_yaml
from configs.reading.parse import shortened
from models.planning.cost import has_formulas, parameters, training_flops_per_token
from trainer.record.terminal import guard

from .commands import checkpoints, dashboard, data, doctor, jobs, keep, plan, presets, runs, trained
from .commands.runs import Json
from .gangs import join
from .gangs.session import signals, stop_early
from .server import submit
from .sweep import commands as sweep

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
ARGUMENTS = "MUSTER_ARGUMENTS"
"""Environment variable that carries the arguments when they contain passwords."""
Source = typer.Argument(metavar="CONFIG", help=f"A preset ({', '.join(preset_names())}) or a YAML file.")
Overrides = typer.Argument(metavar="KEY=VALUE", help="Values to set, such as train.steps=100.")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"muster {version('muster-train')}")
        raise typer.Exit()


@app.callback()
def muster(
    shown: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train Mixture-of-Experts Transformers and other models: Ray schedules, DeepSpeed trains, MLflow records."""


@app.command()
def train(
    config: Annotated[str, Source],
    overrides: Annotated[list[str] | None, Overrides] = None,
    fork: Annotated[
        str | None, typer.Option(metavar="NEW", help="Start a new run, NEW, from run.name's last checkpoint.")
    ] = None,
    submitted: Annotated[
        float | None, typer.Option(hidden=True, help="Unix time at which the cluster's queue accepted the job.")
    ] = None,
) -> None:
    """Train a run, or resume it. Example: muster train quickstart train.steps=600"""
    asked = load(config, overrides or ())
    with signals(stop_early):
        from trainer.run.resolved import refuse_early

        refuse_early(asked, fork)
        from .attempts.launch import launch

        raise typer.Exit(launch(asked, fork=fork, overrides=overrides or (), submitted=submitted))


@app.command("config")
def show_config(
    config: Annotated[str | None, Source] = None,
    overrides: Annotated[list[str] | None, Overrides] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of all config keys.")] = False,
    as_json: Json = False,
) -> None:
    """Print a config with every value resolved. Example: muster config quickstart optim.lr=1e-3"""
    if schema:
        print(json.dumps(Config.model_json_schema(), indent=1))
        return
    if config is None:
        raise ConfigError(f"muster config needs a CONFIG: {', '.join(preset_names())}, or a YAML file")
    from trainer.data.manifest import planned_vocabulary  # numpy
    from trainer.run.plugins import load_own

    asked = load_own(config, overrides or ())
    resolved, notes = resolve(asked, vocab_size=planned_vocabulary(asked))
    if as_json:
        print(resolved.model_dump_json(indent=1))
        return
    print(to_yaml(resolved), end="")
    for note in notes:
        print(f"# {note}")
    if not has_formulas(resolved.model):
        return
    counts, train = parameters(resolved.model), resolved.train
    flops = training_flops_per_token(resolved.model, train.seq_len)
    tokens = train.steps * train.global_batch * train.seq_len
    print(
        f"# cost: {counts.total:,} parameters, {counts.active:,} active per token\n"
        f"#   {flops:.4g} training FLOPs per token, {tokens:.4g} tokens in {counted(train.steps, 'step')}, "
        f"{flops * tokens:.4g} FLOPs in all"
    )


app.command("presets")(presets.presets)
app.command("plan")(plan.plan)
for command in (submit.submit, jobs.jobs, jobs.logs, jobs.stop, jobs.retry, jobs.priority):
    app.command(command.__name__)(command)
app.command("generate")(trained.generate)
app.command("eval")(trained.evaluate)
app.command("landscape")(trained.landscape)
app.command("gradients")(trained.gradients)
app.command("export")(trained.export)
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app, name="checkpoint")
join.app.command("serve")(dashboard.serve)
app.add_typer(join.app, name="cluster")
app.add_typer(sweep.app, name="sweep")
kept = typer.Typer(invoke_without_command=True, callback=runs.runs, rich_markup_mode=None)
kept.command("rm")(keep.remove)
kept.command("note")(keep.note)
kept.command("tag")(keep.tag)
app.add_typer(kept, name="runs")
app.command("status")(jobs.status)
app.command("dashboard")(dashboard.dashboard)
app.command("sync")(runs.sync)
app.command("doctor")(doctor.doctor)


NOT_OURS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.EINVAL,
            errno.EFBIG)  # fmt: skip
"""Errors that mean a path is wrong or not the user's to use: reported in one line, without a traceback."""


def main() -> None:
    """Run the command line and exit with an `ExitCode`."""
    private_files()
    guard()
    _hide_passwords()
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by configs.interrupt during the imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app()
    except ConfigError as error:
        print(f"muster: {mask(str(error))}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)
    except OSError as error:
        if error.errno not in NOT_OURS or not error.filename:
            raise
        print(f"muster: {shortened(str(error.filename), 100)}: {error.strerror}", file=sys.stderr)
        sys.exit(ExitCode.MISTAKE)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _hide_passwords() -> None:
    """Take passwords off the command line, which every user of the machine can read: re-execute with the arguments in
    the environment, which only this user can."""
    if given := os.environ.pop(ARGUMENTS, None):
        sys.argv[1:] = json.loads(given)
        return
    hidden = [_masked(argument) for argument in sys.argv[1:]]
    if hidden != sys.argv[1:] and sys.orig_argv[-len(hidden) :] == sys.argv[1:]:
        os.environ[ARGUMENTS] = json.dumps(sys.argv[1:])
        os.execv(sys.executable, [*sys.orig_argv[: -len(hidden)], *hidden])


def _masked(argument: str) -> str:
    key, sign, value = argument.partition("=")
    return mask(argument) if "://" in key else key + sign + mask(value)


if __name__ == "__main__":
    main()

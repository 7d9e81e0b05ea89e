"""A run's folder: created, checked against the run that it holds, locked while that trains."""

import errno
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import Timeout

from configs import Config, ConfigError, differences, from_dict, load, mask, to_yaml
from configs.explain import shown
from configs.reading.parse import clip
from configs.resolve import with_workers
from trainer.checkpoint.init_from import check_source, other_function
from trainer.checkpoint.manifest import committed, folder
from trainer.checkpoint.store import verify
from trainer.data.kinds import kind_of
from trainer.data.manifest import sources_of
from trainer.files.durable import replace_text
from trainer.files.lock_file import lock_file
from trainer.files.own_files import no_link, open_file, require_own, write_text
from trainer.record.events import reached_its_end
from trainer.record.lines import Record, read_events
from trainer.tracking import NoCredentials, hand_down_password, later, tracking_uri

from .check import check_model
from .durable_state import change_durable_state, read_durable_state
from .plugins import with_plugins
from .resolved import check_fork, resolve_config, writable
from .stop import STOP

CONFIG = "config.yaml"
LOCK = "lock"
LONGEST_COMMAND = 2000


def prepare_run(
    config: Config,
    *,
    fork: str | None = None,
    start: Path | None = None,
    began: float | None = None,
    submitted: float | None = None,
    workers: int | None = None,
) -> Path:
    """Create or check the folder of a run, before any device is held.

    Args:
        config: as the user wrote it.
        fork: name of a new run that starts from the last checkpoint of `run.name` with this config.
        start: a checkpoint that the run starts from, at its step, if it has none of its own.
        began: when this launch began, in Unix seconds; None: when this process did.
        submitted: when its job was queued, in Unix seconds.
        workers: processes that were started to train it; None: as many as the config asks for.

    Returns:
        The folder, whose config.yaml holds the resolved config.

    Raises:
        ConfigError: the config cannot run, or differs from the existing run's in a key that may not change; or as
            `require_own`.
    """
    if submitted is not None and not math.isfinite(submitted):
        raise ConfigError(f"--submitted {submitted}: should be Unix seconds")
    hand_down_password(config)
    config = with_plugins(config)
    config = _as_it_began(config)
    with torch.device("meta"):
        planned = resolve_config(config, prepare=False)[0]
        check_model(planned)  # a model that cannot be built is refused before anything else
    if workers:
        with_workers(planned, workers)
    with writable(config.run.root):
        resolved, notes = resolve_config(config)
    run_dir = Path(resolved.run.root) / resolved.run.name
    require_own(run_dir)
    launched: dict[str, Any] = {
        "derived": notes,
        "began": began or psutil.Process().create_time(),
    }
    if submitted is not None:
        launched["submitted"] = submitted
    if command := _command():
        launched["command"] = command
    if resolved.tracking.enabled and not resolved.tracking.parent:
        try:
            tracking_uri(run_dir, resolved)
        except NoCredentials as error:
            print(f"muster: {error}. Until then nothing is sent; {later(run_dir)}", file=sys.stderr)
    events: list[tuple[str, dict[str, Any]]] = [("resolved", launched)]
    if resolved.train.init_from and not committed(run_dir) and (differs := check_source(resolved)):
        events.append(("init_from", {"differs": differs}))
        _warn_of(differs, f"train.init_from={resolved.train.init_from}")
    if fork:
        start = folder(run_dir, check_fork(run_dir, fork))  # here too: not every caller runs `refuse_early`
        source = resolved.run.name
        resolved = resolved.model_copy(update={"run": resolved.run.model_copy(update={"name": fork})})
        resolved = from_dict(resolved.model_dump(mode="json"), where=f"--fork {fork}")  # checks the name
        run_dir = run_dir.with_name(fork)
        require_own(run_dir)
        if problems := verify(start, digests=False):  # the run's processes check the content, a share each
            raise ConfigError(f"--fork {fork}: the last checkpoint of run.name={source}: {problems[0]}")
        if differs := other_function(start, resolved.model):
            _warn_of(differs, f"run.name={source}")
    elif (run_dir / CONFIG).exists():
        with run_lock(run_dir):  # refuses a run that is being trained
            pass
        if attempts(run_dir):  # a run that never began may change in any way
            changed = _allowed_changes(run_dir, resolved)
            if changed:
                events.append(("config_changed", {"changed": changed}))
            elif is_finished(run_dir):
                events = []  # there is nothing left to train
    if start and events and not committed(run_dir):
        events.append(("forked", {"checkpoint": str(start)}))
    with writable(run_dir):
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if forked := dict(events).get("forked"):  # before config.yaml makes it a run, which would start from scratch
            change_durable_state(run_dir, forked_from=forked["checkpoint"])
        (run_dir / STOP).unlink(missing_ok=True)
        kind_of(resolved).keep(run_dir, resolved.data)
        replace_text(run_dir / CONFIG, to_yaml(resolved))
        record = Record(run_dir, attempts(run_dir))
        for name, details in events:
            record.event(name, **details)
        record.close()
    return run_dir


def followed(run_dir: Path, config: Config) -> list[str]:
    """What became of a preset's values that did not fit the user's, a line each.

    Args:
        config: as the user wrote it; `prepare_run` has been called with it.
    """
    resolved = [event for event in read_events(run_dir) if event["event"] == "resolved"]
    return [note for note in resolved[-1]["derived"] if note.partition("=")[0] in config.defaults] if resolved else []


def _as_it_began(config: Config) -> Config:
    """With the existing run's warmup, unless the user sets one: a preset's warmup follows train.steps, which may change
    within a run, whereas optim.warmup may not.

    Raises:
        ConfigError: that warmup is longer than train.steps.
    """
    run_dir = Path(config.run.root).expanduser() / config.run.name
    if "optim.warmup" not in config.defaults or not (run_dir / CONFIG).is_file() or not attempts(run_dir):
        return config
    warmup = read_config(run_dir).optim.warmup
    if warmup > config.train.steps:
        raise ConfigError(
            f"run {config.run.name} exists with optim.warmup={warmup}, longer than train.steps ({config.train.steps}): "
            f"for a new run set run.name"
        )
    why = "as the run began with" if warmup != config.optim.warmup else ""
    defaults = config.defaults | {"optim.warmup": why}
    return config.model_copy(update={"optim": config.optim.model_copy(update={"warmup": warmup})}).with_defaults(
        defaults
    )


def _command() -> str:
    """The command line that launched this, with passwords masked; empty if it was not one of ours."""
    program = Path(sys.argv[0])
    names = {"muster": "muster", "cluster/cli.py": "muster", "trainer/__main__.py": "torchrun -m trainer"}
    name = names.get(program.name) or names.get(f"{program.parent.name}/{program.name}")
    return " ".join([name, *(shlex.quote(mask(word)) for word in sys.argv[1:])])[:LONGEST_COMMAND] if name else ""


def _warn_of(differs: dict[str, list[Any]], source: str) -> None:
    """Warn of keys that make the weights a run starts from compute a different function."""
    if "tokenizer" in differs:
        print(
            f"muster: warning: the data were tokenized with a different tokenizer than the model's ({source})",
            file=sys.stderr,
        )
    changed = [
        f"{key} was {shown(there, 2000)}, is now {shown(here, 2000)}"
        for key, (there, here) in differs.items() if key != "tokenizer"
    ]  # fmt: skip
    if changed:
        print(
            f"muster: warning: the weights of {source} will behave differently here: {'; '.join(changed)}. Set it back "
            "unless you meant to change it (for example to extend the context)",
            file=sys.stderr,
        )


def _allowed_changes(run_dir: Path, config: Config) -> dict[str, list]:
    """`{key: [before, after]}` of keys that differ from the existing run. Raises ConfigError if one may not change."""
    existing = read_config(run_dir)
    allowed, refused = differences(existing, config)
    before, now = read_durable_state(run_dir).inputs, [entry["digest"] for entry in _inputs(config)]
    old, new = sources_of(existing.data), sources_of(config.data)
    if before == now and "data.path" in refused and [s.weight for s in old] == [s.weight for s in new]:
        allowed["data.path"] = refused.pop("data.path")  # the same data in another place
    elif before != now and len(before) == len(now):
        n = len(now) // len(new)  # inputs per source: prepared data have a manifest and a tokenizer
        other = [i for i in range(len(new)) if before[n * i : n * i + n] != now[n * i : n * i + n]]
        refused["data.path"] = (
            ", ".join(f"{old[i].path} (sha256 {before[n * i][:12]})" for i in other),
            ", ".join(f"{new[i].path} (sha256 {now[n * i][:12]})" for i in other),
        )
    if refused:
        keys = ", ".join(f"{key} was {was} and is now {becomes}" for key, (was, becomes) in refused.items())
        raise ConfigError(
            f"run {config.run.name} exists with another config: {keys}.\n"
            f"Set them back, choose another run.name, or continue from its last checkpoint with --fork NEW"
        )
    return {key: list(pair) for key, pair in allowed.items()}


def _inputs(config: Config) -> list[dict[str, Any]]:
    return kind_of(config).inputs(config.data)


def read_config(run_dir: Path) -> Config:
    """The resolved config of an existing run. Raises ConfigError if the folder is not a run."""
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir} is not a run: it has no {CONFIG}")
    return load(run_dir / CONFIG)


def attempts(run_dir: Path) -> int:
    """Number of attempts so far, which is also the number of the last one."""
    return read_durable_state(run_dir).attempt


def is_finished(run_dir: Path) -> bool:
    """Whether the run has reached the train.steps of its config, or ended early by its train.early_stop."""
    train = read_config(run_dir).train
    ends = [event for event in read_events(run_dir) if event["event"] == "attempt_ended"]
    return bool(ends) and reached_its_end(ends[-1], train.steps, train.early_stop.patience)


@contextmanager
def run_lock(run_dir: Path, patience: float = 0.0) -> Iterator[None]:
    """Lock the run against a second trainer. Raises ConfigError if another process holds it for `patience` seconds."""
    busy = f"run {run_dir.name} is being trained by {{}}: wait for it, stop it, or choose another run.name"
    with hold(run_dir / LOCK, busy, patience):
        yield


@contextmanager
def hold(path: Path, busy: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file that names its holder.

    Args:
        busy: the message if another process holds it for `patience` seconds; {} stands for that process.

    Raises:
        ConfigError: another process holds it, or its file system has no locks.
    """
    try:
        held = lock_file(path, patience, poll=0.5).acquire()
    except Timeout:
        with open_file(path) as file:
            who = clip(file.read(300).decode(errors="replace"))
        raise ConfigError(busy.format(who or "another process")) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise ConfigError(
            f"{path}: its file system does not support locks ({error.strerror}): choose another root"
        ) from None
    with held:
        write_text(path, json.dumps({"host": os.uname().nodename, "pid": os.getpid()}))
        try:
            yield
        finally:
            with suppress(OSError), open(path, "r+", opener=no_link) as file:  # the folder may be gone
                file.truncate(0)

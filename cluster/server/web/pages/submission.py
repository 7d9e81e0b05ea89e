"""Queues a run that a page describes: a config alone, without a file or code of its sender's."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.commands.jobs import new_id
from cluster.gangs.share import TO_WAIT
from configs import Config, ConfigError, resolve
from configs.load import dump_yaml, one_file_apart
from configs.reading.parse import shortened

from ...jobs.board import Board
from ...messages import Job, Known, Submit
from ...pack import read_message, write_zip
from ...submit import CONFIG, check_new, check_workers, job_of_run, kept_keys, needs
from .plan import known_vocabulary, sent_config, sent_text


def run_roots(board: Board, roots: Sequence[Path]) -> list[Path]:
    """Folders that a page may submit runs to: those that the server shows, by the names that jobs can use."""
    return list(dict.fromkeys([*(root.absolute() for root in roots), *board.roots()]))


def submitted(board: Board, roots: Sequence[Path], asked: dict[str, Any]) -> Known:
    """Queue a run as `muster submit` would from an empty folder.

    Args:
        asked: as `plan_responses.RunAsked`.

    Raises:
        ConfigError: the config is invalid, asks for code or a file of the sender's, the run is not a new one in one of
            `roots`, or the machines have no room for it.
        BadMessage: the queue is full.
        OSError: the package or the journal cannot be written.
    """
    config = sent_config(asked)
    _check_place(Path(config.run.root), config.run.name, roots)
    job = needed(board, config, asked)
    check_new(job, board.queue.jobs())
    text, where = sent_text(asked)
    file = dump_yaml(one_file_apart(text, [*asked["overrides"], *kept_keys(job)], where))
    message = Submit(do="submit", id=new_id(job.name), job=job)
    package = board.queue.upload()
    try:
        write_zip(package, package.parent, (), message.model_dump_json(), {CONFIG: file})
        content = package.read_bytes()
        return board.queue.submit(read_message(content), package, hashlib.sha256(content).hexdigest())
    finally:
        package.unlink(missing_ok=True)


def needed(board: Board, config: Config, asked: dict[str, Any]) -> Job:
    """The job that a run would be, which has what it would reserve on the machines that there are.

    Args:
        config: what the page sent, by `sent_config`.
        asked: as `plan_responses.RunAsked`.

    Raises:
        ConfigError: the config is invalid, asks for code or a file of the sender's, or the machines have no room for
            it.
    """
    for key, paths in needs(config).items():
        for path in paths:
            if not os.path.isabs(os.path.expanduser(path)):
                raise ConfigError(
                    f"{key}={shortened(path)} is not absolute, and a page sends no files: give the path of a place "
                    "that every machine of the cluster reaches, or use `muster submit`"
                )
    resolved, _ = resolve(config, vocab_size=known_vocabulary(config))
    check_workers(resolved)
    seen = board.scheduler.seen
    if not seen.reachable or not seen.nodes:
        raise ConfigError(f"the machines are not known: {seen.why or 'none has joined the cluster'}")
    try:
        return job_of_run(resolved, seen.nodes, asked["queue"], asked["priority"])
    except ConfigError as error:
        raise ConfigError(str(error).replace(TO_WAIT, "let it wait for machines to join: tick the box below")) from None


def _check_place(root: Path, name: str, roots: Sequence[Path]) -> None:
    """Raise ConfigError unless a run would be a new folder in one of the server's own."""
    if root not in roots:
        known = ", ".join(map(str, roots)) or "none: name one, `muster cluster up --root /shared/runs`"
        raise ConfigError(
            f"run.root={shortened(root, 200)} is not a folder that this server shows ({known}), the only ones that a "
            "page may submit to"
        )
    if os.path.lexists(root / name):
        raise ConfigError(f"there is a run {name} in {root} already: choose another run.name")

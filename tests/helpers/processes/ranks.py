"""`python -m trainer` as the ranks of one launch, in cheap processes, each with its own exit code and output."""

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from support import forking


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nothing() -> None: ...


def run_ranks(
    folder: Path,
    arguments: list[str],
    count: int = 2,
    before: Callable[..., None] = nothing,
    given: tuple[Any, ...] = (),
    grace_s: float = 60,
) -> list[tuple[int | None, str]]:
    """Run `trainer.__main__` in `folder` as each rank of a group, forked from a process that has imported everything.

    torchrun would add its own report and exit with 1, whatever the ranks' exit codes.

    Args:
        before: module-level function called first in each, with `given` (to inject a fault).
        grace_s: seconds that the others have once a rank has failed, after which they are killed, as torchrun does.

    Returns:
        (exit code, what it wrote to stderr) of each rank.
    """
    context = forking()
    same = (count, free_port(), folder, arguments, before, given)
    ranks = [context.Process(target=_main, args=(rank, *same)) for rank in range(count)]
    for process in ranks:
        process.start()
    end = time.monotonic() + 60
    while (alive := [rank for rank in ranks if rank.is_alive()]) and (left := end - time.monotonic()) > 0:
        wait([rank.sentinel for rank in alive], left)
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.monotonic() + grace_s)
    for process in ranks:
        process.kill()
        process.join()
    return [
        (process.exitcode, (folder / f"stderr-{rank}").read_text(errors="replace"))
        for rank, process in enumerate(ranks)
    ]


def _main(rank: int, count: int, port: int, folder: Path, arguments: list[str], before: Any, given: tuple) -> None:
    os.chdir(folder)
    os.dup2(os.open(f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    sys.argv = ["trainer", *arguments]
    before(*given)
    from trainer.__main__ import main

    raise SystemExit(main())

"""Process groups of any size for one call each: DeepSpeed keeps its groups for life, and a topology needs new ones."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
from support import forking


def in_team(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """Run a module-level `function(*arguments)` in `world` new processes of one process group.

    They fork from a process that has imported everything.

    Returns:
        the results, by rank.
    """
    context = forking()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, port, theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    answers = []
    try:
        for rank, pipe in enumerate(pipes):
            try:
                answers.append(pipe.recv() if pipe.poll(timeout_s) else ("error", f"rank {rank}: no answer"))
            except EOFError:
                answers.append(("error", f"rank {rank} died"))
            if answers[-1][0] == "error":
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [text for kind, text in answers if kind == "error"]
    if errors:
        raise AssertionError(errors[0])
    return [value for _, value in answers]


def _serve(rank: int, world: int, port: int, pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from trainer.engine.start import start_processes

    try:
        start_processes(60)
        result = function(*arguments)
        torch.distributed.barrier()
        pipe.send(("ok", result))
    except BaseException:
        pipe.send(("error", f"rank {rank}: {traceback.format_exc()}"))
    pipe.recv()  # until the answers of all are there

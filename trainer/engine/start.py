"""Join the process group of a run, and hand it to DeepSpeed."""

import os
from datetime import timedelta

import torch

from trainer.health import flight
from trainer.processes import collectives, rendezvous
from trainer.processes.device import device, keep_freed_memory

from .private import deepspeed


def start_processes(timeout_s: float) -> None:
    """Join the process group named by torchrun's environment variables (a single process forms its own group).

    From here on torch's object collectives raise.

    Raises:
        RuntimeError: not all processes joined in time, or one that joined as another rank does not know the attempt's
            secret (trainer.processes.rendezvous).
    """
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    if not torch.distributed.is_initialized():
        where = device()
        if where.type == "cuda":
            torch.cuda.set_device(where)
        else:
            keep_freed_memory()
        flight.switch_on()
        collectives.refuse_pickles()
        rendezvous.stay_here()
        secret = rendezvous.take_secret()
        with rendezvous.all_expected(timeout_s):
            store = rendezvous.open_store(secret, timeout_s)
            torch.distributed.init_process_group(
                "nccl" if where.type == "cuda" else "gloo",
                store=store,
                rank=int(os.environ["RANK"]) if store else -1,
                world_size=int(os.environ["WORLD_SIZE"]) if store else -1,
                timeout=timedelta(seconds=timeout_s),
            )
        if secret:
            rendezvous.prove(secret)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)

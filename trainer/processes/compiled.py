"""The caches that torch.compile leaves for the next attempt, and statistics of what it did in this one.

Private names of torch's compiler are used here and in `models.kernels.compiler`, as seen in torch 2.11 and 2.13. It
takes a second to import, which a process that compiles nothing is spared.
"""

import os
import stat
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from models.tasks.task import Change
from trainer import COMPILED
from trainer.files.scratch import make_folder

from .compile_locks import LOCAL, file_system

SETTLED = 10
"""Steps of an attempt after which a recompilation is an event of its own."""
METRICS = 1024
"""Compilations that torch is to remember between two steps."""


def keep_compiled() -> None:
    """Keep compiled kernels, graphs and autotuning results on this machine for later attempts, where the user has not
    set another folder.

    torch's default is a folder in /tmp with the user's name, which anybody else may have created before.
    """
    from torch._dynamo.utils import set_compilation_metrics_limit
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    set_compilation_metrics_limit(METRICS)
    folder = cache_folder()
    # Set by torch as it is imported, or before that by us.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (default_cache_dir(), COMPILED):
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def load_compiler(whole: bool = True) -> None:
    """Import torch's compiler now, so that the forks of this process have it.

    Args:
        whole: False for the part alone that each of torch's optimizers imports, which takes a second.
    """
    import torch._dynamo

    if whole:
        import torch._inductor.compile_fx  # noqa: F401


def cache_folder() -> Path:
    """A folder on a local disk that only this user may write to; if there is none, a new one each time."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "muster"
    for folder in (home / "compile", Path(tempfile.gettempdir()) / f"muster-compile-{os.getuid()}"):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            found = folder.lstat()
        except OSError:
            continue
        private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        # On a network file system many small files are slow, and locks unreliable.
        if private and file_system(folder.resolve()) in LOCAL:
            return folder
    return make_folder()


class Compilations:
    """What torch.compile did in this process since the start of an attempt."""

    def __init__(self) -> None:
        self._before = _counts()
        if dynamo := _dynamo():
            dynamo.clear_compilation_metrics()
        self._steps, self._recompilations, self._seconds = 0, 0, 0.0

    def after_step(self) -> list[Change]:
        """An event for each recompilation since the previous step, after the first `SETTLED` steps of the attempt."""
        self._steps += 1
        reasons = self._look()
        if self._steps <= SETTLED:
            return []
        return [Change("recompiled", {"reason": reason}) for reason in reasons]

    @property
    def any(self) -> bool:
        return _counts() != self._before

    def summary(self) -> dict[str, Any]:
        """Fields of event `compiled`: graphs, recompilations, graph breaks, cache hits and misses, seconds."""
        self._look()
        counts = {name: count - self._before[name] for name, count in _counts().items()}
        return counts | {"recompilations": self._recompilations, "seconds": round(self._seconds, 3)}

    def _look(self) -> list[str]:
        """The reason for each recompilation since the last call."""
        dynamo = _dynamo()
        found = dynamo.get_compilation_metrics() if dynamo else []
        if found:
            dynamo.clear_compilation_metrics()
        reasons = [str(metrics.recompile_reason) for metrics in found if metrics.recompile_reason]
        self._recompilations += len(reasons)
        self._seconds += sum(metrics.duration_us or 0 for metrics in found) / 1e6
        return reasons


def _dynamo() -> Any:
    """The compiler's module that holds its counters; None if nothing has imported it."""
    return sys.modules.get("torch._dynamo.utils")


def _counts() -> Counter[str]:
    if not (dynamo := _dynamo()):
        return Counter(graphs=0, graph_breaks=0, cache_hits=0, cache_misses=0)
    inductor, counters = dynamo.counters["inductor"], dynamo.counters
    return Counter(
        graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        cache_hits=inductor["fxgraph_cache_hit"],
        cache_misses=inductor["fxgraph_cache_miss"],
    )

"""How one run is trained: DeepSpeed's engine, data, checkpoints and the record. Knows no Ray."""

import contextlib
import os
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m trainer` puts the working directory first, where a file of a library's name would be imported for it.
    # Where ours is found from there alone, or by an editable install's finder, it needs a place of its own.
    del sys.path[0]
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import configs  # noqa: F401  before torch, see configs.search_path

# Before torch loads OpenMP. Its threads spin while they wait for each other, which on a machine that does anything else
# (a shipper, Ray, a neighbour) keeps the very thread they wait for off its core: a step was seen to take 16 s, not 0.9.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Counting GPUs by NVML starts no CUDA, which a fork of the counting process could not use (trainer.processes.warm).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

COMPILED = os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "muster", "compile", "inductor"
)
"""What torch's compiler keeps; `trainer.processes.compiled` sees whether it may stay there."""
# Its import makes a folder, by itself one in the folder for temporary files, where it stays.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    with contextlib.suppress(OSError):  # no home, or one that is full or only to be read: torch's own place
        os.makedirs(os.path.dirname(os.path.dirname(os.path.dirname(COMPILED))), exist_ok=True)
        for _folder in (os.path.dirname(os.path.dirname(COMPILED)), os.path.dirname(COMPILED), COMPILED):
            os.makedirs(_folder, mode=0o700, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED

"""How one run is trained: DeepSpeed's engine, data, checkpoints and the record. Knows no Ray."""

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
# Counting GPUs by NVML starts no CUDA, which a fork of the counting process could not use (trainer.warm).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

"""How one run is trained: DeepSpeed's engine, data, checkpoints and the record. Knows no Ray."""

import os

# Before torch loads OpenMP. Its threads spin while they wait for each other, which on a machine that does anything else
# (a shipper, Ray, a neighbour) keeps the very thread they wait for off its core: a step was seen to take 16 s, not 0.9.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Counting GPUs by NVML starts no CUDA, which a fork of the counting process could not use (trainer.warm).
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

"""Peak rates of known accelerators, and how much memory this process holds."""

import psutil
import torch

PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 and fp16 matmul peaks in TFLOP/s, from NVIDIA's data sheets (SXM variants)."""
PEAK_FP32_TFLOPS = {"H100": 67.0, "H200": 67.0, "A100": 19.5, "B200": 75.0}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak matmul rate in FLOP/s of this device for `train.precision`, or None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    table = PEAK_FP32_TFLOPS if precision == "fp32" else PEAK_BF16_TFLOPS
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in table.items() if key in name), None)


def memory_gb(device: torch.device) -> float:
    """Peak device memory allocated so far on a GPU, resident memory now of this process on a CPU, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9

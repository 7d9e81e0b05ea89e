"""Device capabilities: peak rates, memory, links, each with its source (no torch).

Vendors' peaks are dense (no sparsity) and for the SXM variants of an HGX/DGX machine with eight GPUs. Links are bytes/s
out of one device in one direction. Real code never reaches a peak: `ATTAINED` and `BUS` are the fractions that the
planner assumes.
"""

from dataclasses import dataclass, field, replace

ATTAINED = 0.6
"""Fraction of the peak matmul rate that the products of a step reach on a GPU. Assumed: the best fused attention
reaches 0.75 on an H100 (FlashAttention-3, arXiv:2407.08608, fig. 5), smaller and grouped products much less."""
BUS = 0.8
"""Fraction of a memory's or link's bandwidth that large transfers reach. Assumed."""
EXPERTS = 0.76
"""Rate of a GPU's experts relative to that of its other products, their gather and scatter included. Measured with 32
experts of width 1,024, top-4, hidden size 2,048 (2026-11-27, one H200: benchmarks/RESULTS.md)."""
HEADROOM = 0.1
"""Fraction of a device's memory that a plan leaves free, for fragmentation and prediction error."""


@dataclass(frozen=True)
class Device:
    """One device and its links. Rates are per second."""

    name: str
    flops: dict[str, float]
    """Peak matmul FLOP/s for each `train.precision` except fp8."""
    memory: float
    """Bytes; infinite if a process shares the machine's memory."""
    bandwidth: float
    """Bytes/s of its memory."""
    per_node: int
    """Number of devices on the fast link."""
    node_link: float
    """Bytes/s to the devices of the same node."""
    network: float
    """Bytes/s to other nodes."""
    attained: float = ATTAINED
    """Share of `flops` that matrix products reach."""
    bus: float = BUS
    """Share of the bandwidths that transfers reach."""
    experts: float = 1.0
    """Rate of experts relative to that of other matrix products."""
    elementwise: float = float("inf")
    """Bytes/s of an elementwise pass that computes an exponential; on a GPU as fast as its memory."""
    launch: float = 0.0
    """Seconds that a small operation takes, forward and backward; on a GPU they are queued ahead."""
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def is_cpu(self) -> bool:
        return self.name.startswith("cpu")


def _nvidia(
    name: str, bf16: float, fp32: float, memory: float, bandwidth: float, nvlink: float, network: float, sheet: str
) -> Device:
    return Device(
        name=name,
        flops={"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12},
        memory=memory * 1e9,
        bandwidth=bandwidth * 1e12,
        per_node=8,
        node_link=nvlink * 1e9,
        network=network * 1e9,
        experts=EXPERTS,
        sources={
            "flops": f"{sheet}: BF16 tensor core without sparsity; FP32 without tensor cores, as torch multiplies by "
            "default (no TF32)",
            "memory": sheet,
            "bandwidth": sheet,
            "node_link": f"{sheet}: half of the NVLink figure, which counts both directions",
            "network": "DGX data sheet: one ConnectX port for each GPU",
            "attained": "assumed: see models/planning/devices.py",
            "bus": "assumed: see models/planning/devices.py",
        },
    )


def _measured(device: Device, attained: float, bus: float, where: str) -> Device:
    """The same device with measured values in place of assumed ones."""
    return replace(device, attained=attained, bus=bus, sources=device.sources | {"attained": where, "bus": where})


DEVICES: dict[str, Device] = {
    "h100": _nvidia("h100", 989, 67, 80, 3.35, 450, 50, "NVIDIA H100 data sheet, SXM"),
    # 211 TFLOP of products and attention of a dense model in 339 ms; a copy at 4.24 of 4.8 TB/s.
    "h200": _measured(
        _nvidia("h200", 989, 67, 141, 4.8, 450, 50, "NVIDIA H200 data sheet, SXM"),
        0.63,
        0.88,
        "measured 2026-11-26 on one H200: benchmarks/RESULTS.md",
    ),
    "a100": _nvidia("a100", 312, 19.5, 80, 2.039, 300, 25, "NVIDIA A100 data sheet, 80GB SXM"),
    "b200": _nvidia("b200", 2250, 75, 180, 8.0, 900, 50, "NVIDIA DGX B200 data sheet, an eighth of the machine"),
}

CPU_CORE = {"fp32": 100e9, "bf16": 250e9, "fp16": 250e9}


def cpu(
    flops: dict[str, float] | None = None,
    bandwidth: float = 12e9,
    link: float = 0.7e9,
    memory: float = float("inf"),
    elementwise: float = 5e9,
    launch: float = 10e-6,
) -> Device:
    """One process on one CPU core, as the tests and the quickstart run.

    Args:
        flops: measured matmul FLOP/s by precision. None: a rough figure for one core of a cloud machine (Xeon with
            AMX) in steps of training, below what it reaches in bare products.
        bandwidth: bytes/s of a copy, read and write counted.
        link: bytes/s of gloo's all-reduce between two processes of one machine; an assumption.
        elementwise, launch: see `Device`.
    """
    source = "rough figures of one core of a cloud machine" if flops is None else "measured when the run began"
    return Device(
        name="cpu",
        flops=flops or CPU_CORE,
        memory=memory,
        bandwidth=bandwidth,
        per_node=1 << 20,
        node_link=link,
        network=link,
        attained=1.0,
        bus=1.0,
        elementwise=elementwise,
        launch=launch,
        sources=dict.fromkeys(("flops", "bandwidth", "node_link", "network"), source),
    )

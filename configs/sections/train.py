"""How long, on how much at once and in which precision a run trains, and what it watches."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.base import Length, Section, file_path


class SpikeConfig(Section):
    """A finite loss spike: a loss that many deviations over the recent ones."""

    deviations: PositiveFloat = 6.0
    """Standard deviations over the mean of the window that count as a spike."""
    window: int = Field(64, ge=8)
    """Recent losses the mean and deviation are taken over; no spike before the window is full."""
    action: Literal["record", "rollback"] = "record"
    """`rollback`: go back to the last checkpoint and leave out the batches between."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks in one run after which it stops."""


class ProfileConfig(Section):
    """torch trace and memory snapshot over a range of steps, as artifacts."""

    start: PositiveInt | None = None
    """First profiled step (from 1); None: no profiling."""
    steps: PositiveInt = 3
    """How many steps are profiled."""


class UpcycleConfig(Section):
    """A dense model becomes a Mixture of Experts, each a copy of its layer's MLP at first (arXiv:2212.05055)."""

    noise: float = Field(0.0, ge=0)
    """Gaussian noise on each copy, in standard deviations of the copied matrix."""
    drop_ratio: float = Field(0.0, ge=0, le=1)
    """Drop-Upcycling: share of each expert's hidden units drawn anew, others in each (arXiv:2502.19261 found 0.5)."""


class TrainConfig(Section):
    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    global_batch: PositiveInt = 64
    """Sequences per optimizer step, over all devices."""
    micro_batch: PositiveInt | None = None
    """Sequences per device and forward pass; None: global_batch / data-parallel degree."""
    seq_len: Length = 256
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    """Of weights and activations in the forward and backward pass; master weights are fp32 always. `fp8`: bf16, but
    the linear maps of the layers (not of experts, routers and the head) multiply in fp8, scaled tensor by tensor."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """`full`: keep only each layer's input and compute the layer again in the backward pass; `selective`: of some."""
    checkpoint_every_layers: PositiveInt = 2
    """`selective`: every k-th layer is computed again: layer i (from 0) when (i + 1) % k == 0."""
    compile: bool = False
    """torch.compile each layer: slow start, faster steps; needs a C++ compiler on CPU."""
    deterministic: bool = False
    """On GPUs, kernels that give the same bits each time, so that a resumed run ends bit for bit as one left alone;
    slower, attention above all. On CPUs that is so without it."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on the held-out split; 0: only at the end."""
    eval_sequences: PositiveInt = 128
    """Held-out sequences per evaluation."""
    sample_tokens: NonNegativeInt = 128
    """Tokens per text sample written at each evaluation; 0: no samples."""
    sample_prompts: tuple[str, ...] = ("",)
    """Texts that the samples continue."""
    sample_temperature: float = Field(0.8, ge=0)
    """0: always the likeliest token."""
    max_nonfinite_steps: PositiveInt = 10
    """Skipped steps (non-finite loss or gradient) in a row after which the run stops."""
    spike: SpikeConfig = SpikeConfig()
    """What counts as a loss spike and what follows."""
    profile: ProfileConfig = ProfileConfig()
    """torch trace and memory over some steps."""
    init_from: str | None = None
    """A run, a checkpoint or a Hugging Face folder whose weights (only) the run begins with; None: random weights."""
    upcycle: UpcycleConfig | None = None
    """How train.init_from, which is dense, fills a model with experts; None: it has the same experts."""
    log_every: PositiveInt = 1
    """Steps between metric records."""

    _path = field_validator("init_from")(file_path)

    @property
    def kept_in(self) -> Literal["fp32", "bf16", "fp16"]:
        """What weights and activations are held in: fp8 is a precision of products only."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def recompute_every(self) -> int:
        """Every how many layers one is computed again in the backward pass; 0: none is."""
        return {"none": 0, "full": 1, "selective": self.checkpoint_every_layers}[self.activation_checkpointing]

    @model_validator(mode="after")
    def _check(self):
        if self.micro_batch and self.micro_batch > self.global_batch:
            raise ValueError(
                f"train.micro_batch ({self.micro_batch}) is larger than train.global_batch ({self.global_batch}): "
                f"set train.micro_batch={self.global_batch}"
            )
        if self.upcycle and not self.init_from:
            raise ValueError("train.upcycle needs train.init_from, the dense model whose MLPs become experts")
        return self

"""How long, at which batch size and precision a run trains, and what it monitors."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.base import Length, Section, file_path


class SpikeConfig(Section):
    """A finite loss spike: a loss many standard deviations above the recent ones."""

    deviations: PositiveFloat = 6.0
    """Standard deviations above the window's mean that count as a spike."""
    window: int = Field(64, ge=8)
    """How many recent losses the mean and deviation are computed over; no spike is detected before the window is full.
    """
    action: Literal["record", "rollback"] = "record"
    """`rollback`: return to the last checkpoint and skip the batches in between."""
    max_rollbacks: PositiveInt = 3
    """Most rollbacks in one run; the next spike stops it."""


class EarlyStopConfig(Section):
    """Ending a run once its held-out loss no longer improves."""

    patience: PositiveInt | None = None
    """Evaluations in a row without an improvement after which the run ends; None: it continues to train.steps."""
    min_delta: float = Field(0.0, ge=0)
    """A held-out loss lower than the best one by more than this is an improvement, for optim.schedule=plateau too."""


class ProfileConfig(Section):
    """torch profiler trace and memory snapshot over a range of steps, stored as artifacts."""

    start: PositiveInt | None = None
    """First profiled step (from 1); None: no profiling."""
    steps: PositiveInt = 3
    """Number of profiled steps."""


class UpcycleConfig(Section):
    """Upcycling: a dense model becomes a Mixture of Experts, each expert starting as a copy of its layer's MLP
    (arXiv:2212.05055)."""

    noise: float = Field(0.0, ge=0)
    """Gaussian noise on each copy, in standard deviations of the copied matrix."""
    drop_ratio: float = Field(0.0, ge=0, le=1)
    """Drop-Upcycling: fraction of each expert's hidden units that is re-initialised, different ones in each
    (arXiv:2502.19261 found 0.5)."""


class ViewsConfig(Section):
    """Random views of an image, for tasks that compare them."""

    crop: float = Field(0.3, gt=0, le=1)
    """Smallest share of the image that a crop keeps; it is resized to the whole."""
    flip: bool = False
    """Mirror half of the views, left to right."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Maximum rotation in degrees, either way."""
    jitter: float = Field(0.4, ge=0, lt=1)
    """Maximum change of brightness, contrast and, in colour, saturation, either way."""


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
    """Precision of weights and activations in the forward and backward pass; master weights are always fp32. `fp8`:
    bf16, but the linear layers (except experts, routers and the head) multiply in fp8 with per-tensor scaling."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Classification, and sequence to sequence: share of each target that is spread evenly over all classes
    (arXiv:1512.00567, section 7)."""
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Classification: factor on the loss of each class's examples in training; []: 1 for every class."""
    mixup: float = Field(0.0, ge=0, le=1)
    """Classification of rows or images: each training example is mixed with another one of its micro-batch, and so are
    their labels, in shares from Beta(mixup, mixup) (arXiv:1710.09412); 0: not."""
    cutmix: float = Field(0.0, ge=0, le=1)
    """Classification of images: a box of each training image is filled with that of another one of its micro-batch, and
    the labels have the shares of the pixels, from Beta(cutmix, cutmix) (arXiv:1905.04899); 0: not. With mixup, each is
    for half of the images."""
    mask_rate: float = Field(0.15, gt=0, lt=1)
    """Masked language modelling: share of the tokens that are predicted. Of these, 80% are masked, 10% replaced
    by random tokens, and 10% left as they are (arXiv:1810.04805)."""
    temperature: PositiveFloat = 0.5
    """Contrastive learning: divisor of the cosine similarity of two views."""
    negatives: Literal["micro_batch", "global_batch"] = "micro_batch"
    """Image-text contrastive learning: pairs among which a pair is found, those of its micro-batch or of all processes'
    together, if each has one micro-batch per step."""
    views: ViewsConfig = ViewsConfig()
    """Contrastive learning: how views differ from their image."""
    grad_clip: float = Field(1.0, ge=0)
    """Maximum global gradient norm; 0: no clipping."""
    clip_value: float = Field(0.0, ge=0)
    """Largest magnitude of any element of the gradient, after grad_clip; 0: no clipping."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing. `full`: keep only each layer's input and recompute the layer in the backward pass;
    `selective`: some layers only."""
    checkpoint_every_layers: PositiveInt = 2
    """`selective`: every k-th layer is recomputed: layer i (from 0) if (i + 1) % k == 0."""
    compile: bool = False
    """torch.compile each layer: slow start, faster steps; needs a C++ compiler on CPU."""
    deterministic: bool = False
    """On GPUs, use deterministic kernels, so that a resumed run ends bit for bit like an uninterrupted one; slower,
    attention above all. CPUs are deterministic without it."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on the held-out split; 0: only at the end."""
    eval_sequences: PositiveInt = 128
    """Held-out sequences per evaluation."""
    sample_tokens: NonNegativeInt = 128
    """Tokens per text sample generated at each evaluation; 0: no samples. Sequence to sequence: maximum length of a
    decoded target, for samples and for BLEU and chrF; 0: none of these."""
    sample_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Sequence to sequence: beams when a target is decoded, in evaluations too; 1: greedy."""
    sample_prompts: tuple[str, ...] = ("",)
    """Prompts that the samples continue."""
    sample_temperature: float = Field(0.8, ge=0)
    """Sampling temperature; 0: always the most likely token."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    """Whether the run ends before train.steps."""
    max_nonfinite_steps: PositiveInt = 10
    """Skipped steps (non-finite loss or gradient) in a row after which the run stops."""
    spike: SpikeConfig = SpikeConfig()
    """What counts as a loss spike, and what to do about it."""
    profile: ProfileConfig = ProfileConfig()
    """torch profiler trace and memory snapshot over some steps."""
    init_from: str | None = None
    """A run, a checkpoint or a Hugging Face folder whose weights (and nothing else) the run starts from; None: random
    weights."""
    upcycle: UpcycleConfig | None = None
    """How the dense model of train.init_from becomes one with experts; None: it already has the same experts."""
    log_every: PositiveInt = 1
    """Steps between metric records."""

    _path = field_validator("init_from")(file_path)

    @property
    def kept_in(self) -> Literal["fp32", "bf16", "fp16"]:
        """The dtype that holds weights and activations: fp8 is a precision of matrix products only."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def recompute_every(self) -> int:
        """Every how many layers one is recomputed in the backward pass; 0: none."""
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

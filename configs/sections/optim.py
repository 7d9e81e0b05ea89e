"""Optimizer and learning-rate schedule."""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from configs.base import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(NamedTuple):
    """What is known of an optimizer without torch."""

    states: int
    """How many fp32 values it keeps per weight."""
    kernel: Literal["fused", "foreach", "loop"]
    """How a step is computed: in one fused pass, by operations over whole groups, or tensor by tensor."""
    has_momentum: bool = False
    """One of its states is the momentum, absent if `optim.momentum` is 0."""
    whole_matrices: bool = False
    """It needs the shapes of weights, which ZeRO 1 to 3 flatten: it runs at ZeRO-0 only."""


OPTIMIZERS = {
    "adamw": Optimizer(2, "fused"),
    "adam": Optimizer(2, "fused"),
    "sgd": Optimizer(1, "fused", has_momentum=True),
    "adagrad": Optimizer(1, "foreach"),
    "rmsprop": Optimizer(2, "foreach", has_momentum=True),
    "adafactor": Optimizer(0, "loop", whole_matrices=True),  # a row and a column per matrix: negligible
    "lion": Optimizer(1, "loop"),
    "muon": Optimizer(1, "loop", whole_matrices=True),  # 2 for the embedding, the head and norms, which use AdamW
}


class OptimConfig(Section):
    name: Literal["adamw", "adam", "sgd", "adagrad", "rmsprop", "adafactor", "lion", "muon"] = "adamw"
    """Which optimizer; adafactor and muon need parallel.zero_stage=0, in bf16 or fp32."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """For Adam, AdamW, Lion and Muon's AdamW part."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator: AdamW, Adam, Adagrad, RMSprop, and Muon's AdamW part."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled for AdamW, Adafactor, Lion and Muon; L2 for the others."""
    decay_all: bool = False
    """Also decay norms, biases and embeddings."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """For SGD, RMSprop and Muon."""
    nesterov: bool = True
    """Nesterov momentum, for SGD and Muon."""
    alpha: float = Field(0.99, gt=0, lt=1)
    """RMSprop's smoothing constant."""
    schedule: Literal[
        "constant", "linear", "cosine", "wsd", "inverse_sqrt", "step", "exponential", "one_cycle", "cyclic",
        "cosine_restarts", "plateau",
    ] = "cosine"  # fmt: skip
    """Shape of the learning rate after the warmup. plateau: lowered whenever the held-out loss no longer improves."""
    warmup: NonNegativeInt = 0
    """Steps of linear warmup from 0, with every schedule."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Lowest learning rate in units of the peak: linear, cosine, WSD, exponential, cyclic, cosine_restarts, plateau.
    """
    decay_steps: PositiveInt | None = None
    """WSD: length of the final decay; None: a fifth of the run."""
    step_every: PositiveInt | None = None
    """Step schedule: steps between drops; None: a third of the run."""
    step_factor: float = Field(0.1, gt=0, le=1)
    """Step schedule: factor of each drop."""
    cycle_steps: PositiveInt | None = None
    """Cyclic: steps up and down again; cosine restarts: steps of the first cycle; None: a fifth of the run."""
    cycle_growth: int = Field(1, ge=1, le=100)
    """Cosine restarts: how many times as long each cycle is as the one before."""
    plateau_patience: PositiveInt = 3
    """Plateau: evaluations in a row without an improvement after which the learning rate is lowered."""
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    """Plateau: factor of each drop."""
    l1: float = Field(0.0, ge=0)
    """L1 penalty: its gradient, this times the sign of each weight, is added after clipping; for weights that decay."""
    sam: float = Field(0.0, ge=0)
    """Sharpness-aware minimisation (arXiv:2010.01412): the gradient is taken at the weights that are this far up the
    slope, by a second forward and backward pass; 0: at the weights. Needs plain data parallelism and ZeRO 0 to 2."""
    lookahead_every: PositiveInt | None = None
    """Lookahead (arXiv:1907.08610): every so many steps slow weights go optim.lookahead_share of the way to the
    weights, which go on from there; None: no slow weights. The paper has 5."""
    lookahead_share: float = Field(0.5, gt=0, le=1)
    """See optim.lookahead_every."""
    gradient_noise: float = Field(0.0, ge=0)
    """Gaussian noise on the gradient after clipping, of variance gradient_noise / step ** 0.55 (arXiv:1511.06807, which
    has 0.01, 0.3 and 1); 0: none. It is a function of the seed, the step and the weight."""
    max_weight: PositiveFloat | None = None
    """Clip each weight to this absolute value after each update, as of WGAN's critic (arXiv:1701.07875); None: never.
    """
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the weights in fp32, with this decay per step, such as 0.999; None: none.
    Step t, from 1, decays by min(ema_decay, (1 + t) / (10 + t)). Evaluations measure both weights, those being trained
    (`eval_loss`) and the average (`eval_loss_ema`); samples are drawn with the average."""
    ema_schedule: Literal["warmup", "cosine"] = "warmup"
    """How the decay rises: as said of ema_decay, or from ema_decay at first to 1 at train.steps, 1 - decay along a half
    cosine, as that of BYOL's teacher (arXiv:2006.07733)."""
    swa_from: PositiveInt | None = None
    """Keep the plain average of the weights after this step and every one that follows, in place of an exponential one
    (stochastic weight averaging, arXiv:1803.05407); None: none."""

    @property
    def followers(self) -> int:
        """How many fp32 copies of the weights are kept beside the optimizer's own states."""
        return self.averages + (self.lookahead_every is not None)

    @property
    def averages(self) -> bool:
        """Whether an average of the weights is kept."""
        return self.ema_decay is not None or self.swa_from is not None

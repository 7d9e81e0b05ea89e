"""Keys of neural ordinary differential equations."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from configs.base import ConfigError, Size
from configs.sections.family import ModelSection

ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun")
"""Solvers that choose their steps by the error they estimate."""


class NeuralOdeConfig(ModelSection):
    """A state that follows a learned differential equation from time 0 to 1 (arXiv:1806.07366): a residual network of
    any depth whose layers share their weights."""

    default_task: ClassVar[str] = "classification"
    needs: ClassVar[tuple[str, ...]] = ("torchdiffeq",)
    measures: ClassVar[tuple[str, ...]] = ("evaluations",)

    family: str = "neural_ode"
    inputs: Size = 64
    """Numbers of an example: feature columns of a row, or channels * height * width of an image."""
    channels: Literal[1, 3] | None = None
    """Channels of an image, whose state is then an image too; None: the state is a row of numbers."""
    outputs: Size = 10
    """Classes, or predicted numbers."""
    width: Size = 32
    """Width of the state: numbers, or channels. Where it is wider than the inputs, paths may pass one another
    (arXiv:1904.01681)."""
    hidden: Size = 64
    """Width of the hidden layer of the equation, for rows."""
    downsample: int = Field(0, ge=0, le=10)
    """How many times an image is halved before the equation."""
    solver: Literal["dopri5", "bosh3", "adaptive_heun", "rk4", "midpoint", "euler"] = "dopri5"
    """dopri5, bosh3 and adaptive_heun choose their steps by rtol and atol; rk4, midpoint and euler take those of steps.
    """
    steps: Size = 4
    """Number of steps, for rk4, midpoint and euler."""
    rtol: PositiveFloat = 1e-3
    """Relative error allowed per step."""
    atol: PositiveFloat = 1e-3
    """Absolute error allowed per step."""
    adjoint: bool = False
    """Compute gradients by the adjoint equation, solved backwards in time, which stores only the final state, or that
    after each of the fixed steps. Otherwise gradients pass through everything that the solver computed."""

    @model_validator(mode="after")
    def _fits(self) -> "NeuralOdeConfig":
        if self.downsample and not self.channels:
            raise ValueError("model.downsample applies to images only: set model.channels, or model.downsample=0")
        return self

    @property
    def smallest(self) -> int:
        """Least height and width of an image."""
        return 2**self.downsample

    @property
    def most_zero(self) -> int:
        """The equation backwards in time needs whole weights. Under ZeRO-3 each evaluation gathers them from all
        processes, which therefore must evaluate equally often: they do not where the solver chooses its steps."""
        return 2 if self.adjoint or self.solver in ADAPTIVE else 3

    def check_kind(self, kind: str) -> None:
        if self.channels and kind != "images":
            raise ConfigError(
                f"model.channels={self.channels} is for images, but the run learns from {kind}: leave it out"
            )


class LatentOdeConfig(ModelSection):
    """A variational autoencoder of series with irregular times (latent ODE, arXiv:1907.03907): an encoder whose state
    follows one equation backwards in time from observation to observation, and a latent state that follows another."""

    default_task: ClassVar[str] = "series_reconstruction"
    needs: ClassVar[tuple[str, ...]] = ("torchdiffeq",)

    family: str = "latent_ode"
    inputs: Size = 1
    """Numbers of an observation."""
    latents: Size = 16
    """Numbers of the latent state."""
    encoder_size: Size = 32
    """Of the encoder's state."""
    hidden: Size = 64
    """Width of the hidden layer of each equation, and of the one before the outputs."""
    solver: Literal["rk4", "midpoint", "euler"] = "rk4"
    """Of both equations."""
    steps: Size = 1
    """Of the solver from one time of a series to the next."""
    given: Literal["all", "random", "first"] = "random"
    """Times that the encoder sees: all of them (reconstruction), some (interpolation), or the first (extrapolation)."""
    share: float = Field(0.5, gt=0, lt=1)
    """Share of the times that are given, if not all are; at least one is."""
    noise: PositiveFloat = 0.1
    """Standard deviation of an observation around what is found, in units of the data's own."""
    beta: float = Field(1.0, ge=0)
    """Weight of the divergence of the initial latent state from its prior."""

    @property
    def most_zero(self) -> int:
        """Under ZeRO-3 each evaluation of an equation, several for each time, would gather the weights."""
        return 2

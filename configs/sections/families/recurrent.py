"""Keys of the recurrent language model."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.base import LARGEST, Size
from configs.sections.family import ModelSection

Cell = Literal["tanh", "relu", "gru", "lstm"]
GATES: dict[Cell, int] = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
"""Linear maps of a cell, each from its input and from its state."""


class RecurrentConfig(ModelSection):
    """A recurrent language model: its state begins at zero in every window, and in every document of a window if
    data.document_mask."""

    default_task: ClassVar[str] = "language_modelling"

    family: str = "recurrent"
    vocab_size: Size | None = None
    """Rows of the embedding; None: the tokenizer's size, rounded up to a multiple of 64."""
    cell: Cell = "lstm"
    """tanh or relu (Elman's network), gru (arXiv:1406.1078) or lstm."""
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 2
    """Stacked recurrent layers."""
    hidden_size: Size = 256
    """Width of a layer's state."""
    embedding_size: Size | None = None
    """Width of a token's embedding; None: hidden_size."""
    tie_embeddings: bool = False
    """The output layer has the embedding's weights, which then is hidden_size wide (arXiv:1608.05859)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before, between and after the layers (arXiv:1409.2329)."""
    detach_every: int = Field(0, ge=0, le=LARGEST)
    """Truncated backpropagation through time: after every so many tokens of a window the state is passed on, but no
    gradient flows back; 0: gradients reach back to the beginning of the window."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tie_embeddings and self.width != self.hidden_size:
            raise ValueError(
                f"model.tie_embeddings needs model.embedding_size ({self.width}) to be model.hidden_size "
                f"({self.hidden_size}): leave model.embedding_size out"
            )
        return self

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        return self.embedding_size or self.hidden_size

    @property
    def inputs(self) -> tuple[int, ...]:
        """Width of each layer's input."""
        return (self.width, *[self.hidden_size] * (self.num_layers - 1))

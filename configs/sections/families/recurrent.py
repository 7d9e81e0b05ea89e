"""Keys of recurrent networks."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.base import LARGEST, Size
from configs.sections.family import ModelSection, check_outputs

Cell = Literal["tanh", "relu", "gru", "lstm"]
GATES: dict[Cell, int] = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
"""Linear maps of a cell, each from its input and from its state."""


class RecurrentConfig(ModelSection):
    """A recurrent language model, or classifier of texts: its state begins at zero in every window, and in every
    document of a window if data.document_mask."""

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

    bidirectional: bool = False
    """Each layer reads in both directions, with weights for each; a language model then predicts hidden tokens."""
    outputs: Size | None = None
    """Classes, or numbers, of a text; None: the next tokens are predicted."""
    pool: Literal["last", "mean"] = "last"
    """What a text is classified by: the state after its last token (of the other direction after its first), or the
    mean over all states."""

    @classmethod
    def variant(cls, keys: Mapping[str, Any]) -> type[ModelSection]:
        if keys.get("outputs") is not None:
            return RecurrentClassifierConfig
        return BidirectionalConfig if keys.get("bidirectional") else cls

    def check_kind(self, kind: str) -> None:
        check_outputs(self, kind)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tie_embeddings and self.width != self.state:
            keys = "2 model.hidden_size" if self.bidirectional else "model.hidden_size"
            raise ValueError(
                f"model.tie_embeddings needs model.embedding_size ({self.width}) to be {keys} ({self.state}): "
                + (f"set model.embedding_size={self.state}" if self.bidirectional else "leave model.embedding_size out")
            )
        if self.bidirectional and self.detach_every:
            raise ValueError("model.detach_every is for a network that reads in one direction: leave it out")
        return self

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        return self.embedding_size or self.hidden_size

    @property
    def state(self) -> int:
        """Width of what a layer gives for each token."""
        return 2 * self.hidden_size if self.bidirectional else self.hidden_size

    @property
    def inputs(self) -> tuple[int, ...]:
        """Width of each layer's input."""
        return (self.width, *[self.state] * (self.num_layers - 1))


class BidirectionalConfig(RecurrentConfig):
    """A language model that reads in both directions."""

    default_task: ClassVar[str] = "masked_language_modelling"
    ends = (("tokens", "texts"), ("logits of tokens", "classes", "numbers"))
    added_tokens: ClassVar[int] = 1
    """Beside the tokenizer's: the mask, as in the family encoder."""


class RecurrentClassifierConfig(RecurrentConfig):
    """One that tells what a text is."""

    default_task: ClassVar[str] = "classification"

"""Keys of networks that read one sequence and write another."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.base import Size
from configs.sections.family import ModelSection


class EncoderDecoderConfig(ModelSection):
    """An encoder of the source and a decoder of the target, which have one tokenizer."""

    default_task: ClassVar[str] = "sequence_to_sequence"

    family: str = "encoder_decoder"
    vocab_size: Size | None = None
    """Rows of the embedding; None: the tokenizer's size, rounded up to a multiple of 64."""
    network: Literal["transformer", "bahdanau", "luong"] = "transformer"
    """transformer (arXiv:1706.03762); or gated recurrent units, read in both directions, whose decoder attends to the
    source before each state (bahdanau, arXiv:1409.0473) or after it (luong, arXiv:1508.04025)."""
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 2
    """Layers of the encoder, and of the decoder."""
    hidden_size: Size = 128
    """Width of embeddings and of layers (of each direction, in a recurrent encoder)."""
    num_heads: Size = 4
    """transformer: heads of attention."""
    intermediate_size: Size = 512
    """transformer: width between the two linear maps of a layer."""
    norm: Literal["post", "pre"] = "post"
    """transformer: LayerNorm after each residual sum, as first published, or before each part of a layer
    (arXiv:2002.04745), which needs no warmup."""
    tie_embeddings: bool = True
    """The output layer has the embedding's weights."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of embeddings and of each part's output."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.network == "transformer" and (self.hidden_size % 2 or self.hidden_size % self.num_heads):
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) should be even and a multiple of model.num_heads "
                f"({self.num_heads})"
            )
        return self

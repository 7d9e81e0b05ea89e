"""Keys of bidirectional Transformers: the encoder of tokens, and the vision Transformer."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from configs.base import Length, Size
from configs.sections.family import ModelSection, Predicting, check_outputs
from configs.sections.model import MOST_LAYERS, ModelConfig

from .convnet import ConvNetConfig


class LayersConfig(ModelSection):
    """What layers of bidirectional attention and an MLP have in common."""

    num_layers: int = Field(4, gt=0, le=MOST_LAYERS)
    """Transformer layers."""
    hidden_size: Size = 256
    """Width of the residual stream."""
    num_heads: Size = 8
    """Heads of attention."""
    intermediate_size: Size | None = None
    """Width inside the MLP; None: 4 hidden_size, with swiglu 8/3 of it, rounded up to a multiple of 64."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP; swiglu: a second linear map gated by swish, without biases (arXiv:2002.05202)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    norm_eps: PositiveFloat = 1e-12
    """Epsilon of every norm."""
    pre_norm: bool = True
    """Norms before attention and MLP, and one after the last layer (arXiv:2002.04745); false: after each residual sum,
    as in BERT."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the output of each attention and MLP block and on the embedding."""
    stochastic_depth: float = Field(0.0, ge=0, lt=1)
    """Share of examples that skip the attention, and as many the MLP, of the last layer in training; it rises linearly
    from 0 for the first (arXiv:1603.09382)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""

    @property
    def inner(self) -> int:
        """`intermediate_size`, derived where it is None."""
        default = 4 * self.hidden_size if self.activation == "gelu" else -(-8 * self.hidden_size // 3 // 64) * 64
        return self.intermediate_size or default

    @property
    def derived(self) -> dict[str, tuple[object, str]]:
        why = "4 hidden_size" if self.activation == "gelu" else "8/3 hidden_size"
        return {} if self.intermediate_size else {"intermediate_size": (self.inner, why)}

    @property
    def of_attention(self) -> ModelConfig:
        """The decoder's keys that describe the same attention."""
        return ModelConfig(
            hidden_size=self.hidden_size, num_heads=self.num_heads, qkv_bias=True, qk_norm=False,
            rope_theta=getattr(self, "rope_theta", 10000.0),
        )  # fmt: skip

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) is not a multiple of model.num_heads ({self.num_heads})"
            )
        return self


class EncoderConfig(LayersConfig):
    """A bidirectional Transformer on tokens (BERT, arXiv:1810.04805)."""

    default_task: ClassVar[str] = "masked_language_modelling"
    added_tokens: ClassVar[int] = 1
    """Beside the tokenizer's: the mask, whose id is the number of these."""

    family: str = "encoder"
    vocab_size: Size | None = None
    """Rows of the embedding; None: the tokenizer's size and the mask, rounded up to a multiple of 64."""
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    """How a token's position reaches the network: a learned vector (BERT) or a sine wave (arXiv:1706.03762) added to
    its embedding, or rotated queries and keys (arXiv:2104.09864)."""
    max_positions: Length | None = None
    """Longest position; None: train.seq_len."""
    rope_theta: float = Field(10000.0, ge=1)
    """Base of the rotary frequencies."""
    tie_embeddings: bool = True
    """Tie the head to the embedding's weights."""
    outputs: Size | None = None
    """Classes, or numbers, of a text; None: the tokens that are hidden are predicted."""
    pool: Literal["token", "mean"] = "token"
    """What a text is classified by: the output of the token before it (BERT's [CLS]), or the mean over all tokens'."""

    @classmethod
    def variant(cls, keys: Mapping[str, Any]) -> type[ModelSection]:
        return TextEncoderConfig if keys.get("outputs") is not None else cls

    def check_kind(self, kind: str) -> None:
        check_outputs(self, kind)

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.positions == "rotary" and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"model.positions=rotary needs an even head size, but model.hidden_size / model.num_heads is "
                f"{self.hidden_size // self.num_heads}"
            )
        return self


class TextEncoderConfig(EncoderConfig):
    """One that tells what a text is."""

    default_task: ClassVar[str] = "classification"


class PatchesConfig(LayersConfig):
    """An image as a sequence of patches."""

    image_size: Size = 224
    """Height and width of an image."""
    patch_size: Size = 16
    """Height and width of a patch."""
    channels: Literal[1, 3] = 3
    """Channels of an image, as in data.images.channels."""

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size ({self.image_size}) is not a multiple of model.patch_size ({self.patch_size})"
            )
        return self


class VitConfig(PatchesConfig, Predicting):
    """A vision Transformer (arXiv:2010.11929)."""

    default_task: ClassVar[str] = "classification"

    family: str = "vit"
    outputs: Size = 10
    """Classes."""
    pool: Literal["token", "mean"] = "token"
    """What is classified: a class token's output (as in the paper), or the mean over the patches'."""


class DualEncoderConfig(ModelSection):
    """Two networks whose outputs are compared: one on images, a Transformer on the bytes of texts (CLIP,
    arXiv:2103.00020)."""

    default_task: ClassVar[str] = "image_text_contrastive"

    family: str = "dual_encoder"
    vit: VitConfig | None = None
    """The network on images, if it is a vision Transformer; its outputs are the size of an embedding."""
    convnet: ConvNetConfig | None = None
    """The network on images, if it is convolutional: either this or vit."""
    text: LayersConfig = LayersConfig()
    """The network on texts."""
    text_length: Size = 64
    """Bytes that are read of a text."""
    temperature: PositiveFloat = 0.07
    """What cosines are divided by at first; it is learned."""

    @property
    def image(self) -> VitConfig | ConvNetConfig:
        """That of the network on images."""
        found = self.vit or self.convnet
        assert found
        return found

    @property
    def channels(self) -> int:
        return self.image.channels

    @property
    def image_size(self) -> int | None:
        return self.vit.image_size if self.vit else None

    @property
    def smallest(self) -> int:
        return self.convnet.smallest if self.convnet else 1

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.vit is None) == (self.convnet is None):
            given = "both are" if self.vit else "neither is"
            raise ValueError(f"needs either model.vit or model.convnet, the network on images, but {given} set")
        return self


class MaeConfig(PatchesConfig):
    """A masked autoencoder (arXiv:2111.06377): a vision Transformer on some patches, and a small one on all places."""

    default_task: ClassVar[str] = "masked_reconstruction"

    family: str = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that are hidden; at least one is hidden and one is visible."""
    decoder_layers: int = Field(2, gt=0, le=MOST_LAYERS)
    """Layers of the decoder."""
    decoder_size: Size = 128
    """Width of the decoder's residual stream."""
    decoder_heads: Size = 4
    """Heads of the decoder's attention."""

    @property
    def kept(self) -> int:
        """Patches that are not hidden."""
        return min(max(1, self.num_patches - round(self.mask_ratio * self.num_patches)), self.num_patches - 1)

    @property
    def decoder(self) -> LayersConfig:
        """Of the decoder's layers, which have no dropout."""
        keys = {"num_layers": self.decoder_layers, "hidden_size": self.decoder_size, "num_heads": self.decoder_heads}
        same = {key: getattr(self, key) for key in ("activation", "norm", "norm_eps", "pre_norm")}
        return LayersConfig(**keys, **same)

    @model_validator(mode="after")
    def _decodes(self) -> Self:
        if self.decoder_size % self.decoder_heads:
            raise ValueError(
                f"model.decoder_size ({self.decoder_size}) is not a multiple of model.decoder_heads "
                f"({self.decoder_heads})"
            )
        if self.num_patches < 2:
            raise ValueError(
                f"model.patch_size ({self.patch_size}) makes one patch of the image: set it to less than "
                f"model.image_size ({self.image_size})"
            )
        return self

"""Keys of any architecture of Hugging Face transformers: its class, and the keys of its config."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from configs.base import LARGEST, Size
from configs.reading.parse import shortened
from configs.sections.family import ModelSection
from configs.sections.model import MOST_LAYERS

SET_ELSEWHERE = {
    "vocab_size": "set model.vocab_size",
    "num_labels": "set model.outputs",
    "id2label": "set model.outputs",
    "label2id": "set model.outputs",
    "num_channels": "set model.channels",
    "architectures": "set model.architecture",
    "dtype": "set train.precision",
    "torch_dtype": "set train.precision",
}
"""Keys of a network's config that other keys of ours decide."""
REFUSED = {
    "attn_implementation", "experts_implementation", "auto_map", "backbone", "backbone_config", "backbone_kwargs",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "per_layer_config", "problem_type",
    "quantization_config", "return_dict", "transformers_version", "use_cache", "use_pretrained_backbone",
    "use_timm_backbone",
}  # fmt: skip
"""Keys that say how a network is run or where it comes from, not what it computes: some would fetch code or weights."""
COUNTED = ("layer", "depth", "block", "stage", "expert")
"""Parts of the names of keys that say how often something is built."""
INFINITE = "__float__"
"""Key under which transformers writes infinity, which JSON lacks."""
DEEPEST, MOST_ENTRIES = 6, 1000


def is_random(key: str) -> bool:
    """Whether a key of a network's config makes its training pass draw random numbers."""
    return "drop" in key or key.endswith("jitter_noise") or key in ("mask_time_prob", "mask_feature_prob")


class TransformersConfig(ModelSection):
    """Any architecture of Hugging Face transformers that a task can train, with random weights, or from a folder by
    model.from and train.init_from. One that reads tokens has also vocab_size; a classifier outputs, of images channels
    too."""

    needs: ClassVar[tuple[str, ...]] = ("transformers",)

    family: str = "transformers"
    architecture: str
    """Class in transformers, such as GPT2LMHeadModel, MambaForCausalLM, ViTForImageClassification. What it ends in
    decides the task: ForCausalLM, LMHeadModel: language_modelling; ForMaskedLM: masked_language_modelling;
    ForImageClassification, ForSequenceClassification: classification; ForConditionalGeneration, MTModel:
    sequence_to_sequence."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of the class's config, as in config.json; the others have its defaults. Dropout is 0: that of transformers
    depends on which process handles an example."""

    @classmethod
    def variant(cls, keys: Mapping[str, Any]) -> type[ModelSection]:
        name = keys.get("architecture")
        return (isinstance(name, str) and kind_of_class(name)) or cls

    @field_validator("architecture")
    @classmethod
    def _can_be_trained(cls, name: str) -> str:
        if not name.isidentifier():
            raise ValueError("should be the name of a class")
        if not kind_of_class(name):
            raise ValueError(f"no task can train this class: its name should end in {' or '.join(BY_ENDING)}")
        return name

    @field_validator("config", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for path, each in _leaves(value):
                _check(path, each)
        return value


class LanguageModel(TransformersConfig):
    """A class that reads tokens."""

    vocab_size: Size | None = None
    """Rows of the embedding; None: the tokenizer's size, with a mask where it needs one, rounded up to a multiple of
    64."""


class CausalLanguageModel(LanguageModel):
    """A class that predicts the next token."""

    default_task: ClassVar[str] = "language_modelling"
    ends: ClassVar[tuple[str, str] | None] = ("tokens", "loss of tokens")


class MaskedLanguageModel(LanguageModel):
    """A class that predicts tokens from those on both sides."""

    default_task: ClassVar[str] = "masked_language_modelling"
    ends: ClassVar[tuple[str, str] | None] = ("tokens", "logits of tokens")
    added_tokens: ClassVar[int] = 1
    """Beside the tokenizer's: the mask, as in the family encoder."""


class TextClassifier(LanguageModel):
    """A class that tells what a text is."""

    default_task: ClassVar[str] = "classification"
    ends = ("texts", ("classes", "numbers"))

    outputs: Size = 2
    """Classes, or numbers."""


class SequenceToSequenceModel(LanguageModel):
    """A class that reads one text and writes another."""

    default_task: ClassVar[str] = "sequence_to_sequence"
    ends = ("pairs", "next tokens")

    @property
    def most_zero(self) -> int:
        """Of Switch Transformers' experts, each a module of its own, a process calls those that its tokens choose; from
        stage 2 on processes exchange what each module has as it is called."""
        return 1 if self.architecture.startswith(("SwitchTransformers", "NllbMoe")) else 3


class ImageClassifier(TransformersConfig):
    """A class that tells what an image shows."""

    default_task: ClassVar[str] = "classification"
    ends: ClassVar[tuple[str, str] | None] = ("images", "classes")

    outputs: Size = 10
    """Classes."""
    channels: Literal[1, 3] = 3
    """Channels of an image, as in data.images.channels."""

    @property
    def image_size(self) -> int | None:
        """Height and width of an image; None: any, or not said."""
        size = self.config.get("image_size")
        return size if isinstance(size, int) else None


BY_ENDING: dict[str, type[TransformersConfig]] = {
    "ForCausalLM": CausalLanguageModel,
    "LMHeadModel": CausalLanguageModel,
    "ForMaskedLM": MaskedLanguageModel,
    "ForImageClassification": ImageClassifier,
    "ForSequenceClassification": TextClassifier,
    "ForConditionalGeneration": SequenceToSequenceModel,
    "MTModel": SequenceToSequenceModel,
}
"""Sections by what the name of a class ends in."""


def kind_of_class(name: str) -> type[TransformersConfig] | None:
    """The section of a class; None: no task trains it."""
    return next((kind for ending, kind in BY_ENDING.items() if name.endswith(ending)), None)


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of every number, text, truth value and null. Raises ValueError."""
    if len(path) > DEEPEST or (isinstance(tree, dict | list | tuple) and len(tree) > MOST_ENTRIES):
        raise ValueError(f"{'.'.join(path[:3])}: too many values, or nested too deeply")
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(key, str) or not key.isprintable() or len(key) > 100:
                raise ValueError("its keys should be short names")
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _leaves(value, path)
    else:
        yield path, tree


def _check(path: tuple[str, ...], value: Any) -> None:
    key, name = path[-1], ".".join(path)
    if key == INFINITE and value in ("Infinity", "-Infinity"):
        return
    if len(path) == 1 and key in SET_ELSEWHERE:
        raise ValueError(f"{key}: {SET_ELSEWHERE[key]} instead")
    if any(each.startswith("_") or each in REFUSED for each in path) or path == ("model_type",):
        raise ValueError(f"{shortened(name, 60)} is not a key that describes a network: leave it out")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if len(value) > 100 or not value.isprintable():
            raise ValueError(f"{shortened(name, 60)}: should be a short text")
    elif not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 2**30:
        raise ValueError(f"{shortened(name, 60)}: should be a number up to 2^30, a text, true, false or null")
    elif is_random(key) and value:
        raise ValueError(
            f"{shortened(name, 60)}={value}: dropout and noise of transformers depend on the process that an example "
            "is in: set it to 0, or leave it out"
        )
    elif isinstance(value, int) and any(part in key for part in COUNTED) and value > MOST_LAYERS:
        raise ValueError(f"{shortened(name, 60)}={value}: at most {MOST_LAYERS:,}")
    elif isinstance(value, int) and value > LARGEST and key.endswith("_size"):
        raise ValueError(f"{shortened(name, 60)}={value}: at most {LARGEST:,}")

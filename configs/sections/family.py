"""The section `model:` has the keys of its family: the decoder's, or those of a plugin."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, ValidatorFunctionWrapHandler

from configs.base import ConfigError, Section, Size
from configs.reading.parse import shortened

DECODER = "decoder"


class ModelSection(Section):
    """Keys of a family of models; a plugin's family subclasses this.

    Attributes:
        default_task: the task if the config names none.
        cuts: the degrees of parallel.* that can split its network, of tp, pp, ep and sp. None: dp and ZeRO only.
        ends: what its network takes and gives, where the networks of a family differ in it; None: as the family.
        needs: modules that it cannot do without, of the extra `families`.
        measures: numbers that it measures as it computes (`models.batch.Measured`), to be recorded.
    """

    default_task: ClassVar[str] = ""
    cuts: ClassVar[frozenset[str]] = frozenset()
    ends: ClassVar[tuple[str | tuple[str, ...], str | tuple[str, ...]] | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[tuple[str, ...]] = ()

    family: str = DECODER
    """Entry of the family table (`models/families.py`), or one that a plugin registers."""

    @classmethod
    def variant(cls, keys: Mapping[str, Any]) -> "type[ModelSection]":
        """The section that checks these keys: a subclass, where networks of a family have different ones."""
        return cls

    def check_kind(self, kind: str) -> None:
        """Raise ConfigError if the network as configured cannot take this kind of examples, though the family can."""

    @property
    def most_zero(self) -> int:
        """The highest ZeRO stage that it trains with."""
        return 3

    @property
    def scaled_by_examples(self) -> bool:
        """Whether its initial weights are scaled by what the network makes of the first training examples."""
        return False

    @property
    def is_known(self) -> bool:
        """Whether the keys were checked: not until the plugin that defines the family is loaded."""
        return True

    @property
    def derived(self) -> dict[str, tuple[object, str]]:
        """Values of keys that are None and follow from others, each with what it follows from."""
        return {}

    @property
    def is_moe(self) -> bool:
        """Whether it has routed experts."""
        return False


class Predicting(ModelSection):
    """Keys of a family that may predict embeddings from embeddings, as BYOL's online network does."""

    predictor: Annotated[tuple[Size, ...], Field(min_length=1, max_length=100)] | None = None
    """Task self_distillation: widths of the hidden layers, with BatchNorm and ReLU, of the predictor, which follows the
    outputs and ends in as many; None: no predictor."""

    @property
    def ends(self) -> tuple[str, str] | None:  # type: ignore[override]
        return None if self.predictor is None else ("images", "predictions")


class UnknownFamily(ModelSection):
    """The keys, as given, of a family whose plugin is not loaded: enough to list and compare runs."""

    model_config = ConfigDict(extra="allow")

    @property
    def is_known(self) -> bool:
        return False


def check_outputs(model: Any, kind: str) -> None:
    """`ModelSection.check_kind` of networks that read tokens, and with the key `outputs` tell what a text is."""
    if kind == "texts" and model.outputs is None:
        raise ConfigError("model.outputs is not set: set it to the number of classes, or of numbers, of a text")
    if kind == "tokens" and model.outputs is not None:
        raise ConfigError(
            f"model.outputs={model.outputs} makes the network classify whole texts: leave it out, or set "
            "task=classification or task=regression"
        )


SECTIONS: dict[str, type[ModelSection]] = {}
"""Config class by family name, except the decoder's: `configs.sections.run` has ours, `models.families.FAMILIES` adds
those of plugins."""


def by_family(value: Any, of_decoder: ValidatorFunctionWrapHandler) -> Any:
    """Validate a model section by the rules of its family."""
    family = value.get("family", DECODER) if isinstance(value, Mapping) else getattr(value, "family", DECODER)
    if family == DECODER or not isinstance(family, str):
        return of_decoder(value)
    return value if isinstance(value, ModelSection) else section_of(family).variant(value).model_validate(value)


def no_such(key: str, name: str, known: Iterable[str]) -> ConfigError:
    """What to raise where a key names an entry of a table that has none of that name."""
    near = difflib.get_close_matches(name, known := sorted(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)} (a plugin may add one)"
    return ConfigError(f"{key}={shortened(name, 60)}: no such {key.rpartition('.')[2]}; {hint}")


def section_of(family: Any) -> type[ModelSection]:
    return SECTIONS.get(family, UnknownFamily) if isinstance(family, str) else UnknownFamily

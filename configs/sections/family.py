"""The section `model:` is that of its family: the decoder's own, or one that a plugin brings."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, ValidatorFunctionWrapHandler

from configs.base import Section

DECODER = "decoder"


class ModelSection(Section):
    """Keys of a family of models; a plugin's family subclasses this.

    Attributes:
        default_task: what the family learns where the config names no task.
        cuts: the degrees of parallel.* that cut its network, of tp, pp, ep and sp. None: it goes with dp and ZeRO only.
    """

    default_task: ClassVar[str] = ""
    cuts: ClassVar[frozenset[str]] = frozenset()

    family: str = DECODER
    """Entry of the family table (`models/families.py`) or one that a plugin registers."""

    @property
    def is_known(self) -> bool:
        """Whether the keys were checked: not before the plugin is loaded that brings the family."""
        return True


class UnknownFamily(ModelSection):
    """The keys of a family whose plugin is not loaded, as they were given: enough to list and to compare runs."""

    model_config = ConfigDict(extra="allow")

    @property
    def is_known(self) -> bool:
        return False


SECTIONS: dict[str, type[ModelSection]] = {}
"""By family: `models.families.FAMILIES` fills it."""


def by_family(value: Any, of_decoder: ValidatorFunctionWrapHandler) -> Any:
    """Validate the section of a model as that of its family."""
    family = value.get("family", DECODER) if isinstance(value, Mapping) else getattr(value, "family", DECODER)
    if family == DECODER or not isinstance(family, str):
        return of_decoder(value)
    return value if isinstance(value, ModelSection) else section_of(family).model_validate(value)


def section_of(family: Any) -> type[ModelSection]:
    return SECTIONS.get(family, UnknownFamily) if isinstance(family, str) else UnknownFamily

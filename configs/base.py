"""The base class of every config section and the one error a user's mistake ends in."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class ConfigError(ValueError):
    """A mistake in what the user asked for: one to three lines, naming the key to change."""


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error (`configs.load` suggests the near name)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1, so that `train.steps=yes` would train one step.
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false (in YAML also yes, no, on, off) are no value of this key")
        return value

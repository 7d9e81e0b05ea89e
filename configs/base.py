"""The base class of every config section and the one error a user's mistake ends in."""

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A mistake in what the user asked for: one to three lines, naming the key to change."""


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error (`configs.load` suggests the near name)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

"""The base class of every config section, and the error that reports a user's mistake."""

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from .credentials import mask_all
from .reading.parse import CONTROL, shortened

LARGEST = 2**24
Size = Annotated[int, Field(gt=0, le=LARGEST)]
"""Upper bound on one dimension of a model: above any real model, small enough to plan with."""
Length = Annotated[int, Field(gt=0, le=2**30)]
"""Longest sequence, in tokens."""
Degree = Annotated[int, Field(gt=0, le=2**20)]
"""Most processes in one group."""
MOST = 2**63
"""Upper bound on integers, as in a tensor or a file."""
MOST_FLOAT = 1e30
"""Upper bound on floats, so that products of a few of them stay finite."""
LONGEST_PATH, LONGEST_NAME = 4095, 255
"""Longest path and longest file name, in bytes (Linux)."""


class ExitCode(enum.IntEnum):
    """Exit codes of a command."""

    FINISHED = 0
    FAILED = 1
    MISTAKE = 2
    """A mistake in the user's input: a ConfigError."""
    STOPPED = 75
    """Stopped on request; the same command continues the run (EX_TEMPFAIL)."""
    INTERRUPTED = 130
    """Ctrl-C with nothing to resume."""


class ConfigError(ValueError):
    """A mistake in the user's input: one to three lines that name the key to change."""


NO_TRUTH = "true and false (in YAML also yes, no, on, off) are not valid here"


def _takes_truth(field: FieldInfo) -> bool:
    """Whether a boolean is a value of this key, or is refused as no section (`configs.explain` names its keys)."""
    kind = field.annotation
    return kind is bool or (isinstance(kind, type) and issubclass(kind, BaseModel))


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error (`configs.load` suggests a similar name)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1, so that `train.steps=yes` would train one step.
        if isinstance(value, bool) and info.field_name and not _takes_truth(cls.model_fields[info.field_name]):
            what = " ".join((cls.model_fields[info.field_name].description or "").split())
            raise ValueError(f"{NO_TRUTH}{f': {shortened(what, 200)}' if what else ''}")
        if isinstance(value, bytes):  # pydantic would accept them as text
            raise ValueError("should be text")
        return value

    @field_validator("*")
    @classmethod
    def _within_bounds(cls, value: Any) -> Any:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int) and not -MOST <= each < MOST:
                raise ValueError("should be a whole number of at most 64 bits")
            if isinstance(each, float) and abs(each) > MOST_FLOAT:
                raise ValueError(f"should be at most {MOST_FLOAT:g}")
        if isinstance(value, str) and CONTROL.search(value):
            raise ValueError("has a control character, or half of a surrogate pair")
        if isinstance(value, str) and len(value) > LONGEST_PATH:
            raise ValueError(f"should have at most {LONGEST_PATH:,} characters")
        return value

    @field_serializer("*", mode="wrap", when_used="json")
    def _without_passwords(self, value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
        # Everything that is written or shown of a config passes here; code that needs the password reads the object.
        return mask_all(serialize(value))

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, mask_all(value)) for name, value in super().__repr_args__()]


class Typed(BaseModel):
    """A value read from JSON that we wrote but anyone may have edited since: exact types, no coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_keys(cls, value: Any) -> Any:
        # pydantic would keep an error of 1 KB for each of a million.
        if isinstance(value, dict) and (unknown := value.keys() - cls.model_fields.keys()):
            raise ValueError(f"unknown key {shortened(min(unknown), 60)!r}")
        return value


def at_most(count: int) -> BeforeValidator:
    """For `Annotated`: rejects a list or mapping with more entries before any of them is validated. pydantic checks
    every entry of a mapping first, and keeps an error of 1 KB for each; in a list `FailFast` stops it."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"it has {len(value):,} entries, at most {count:,} are allowed")
        return value

    return BeforeValidator(check)


def file_path(value: Any) -> Any:
    """A path, checked. Raises ValueError if no file can have it."""
    if isinstance(value, str):
        if CONTROL.search(value):
            raise ValueError("a path cannot contain control characters")
        names = value.encode().split(b"/")
        if len(value.encode()) > LONGEST_PATH or max(map(len, names)) > LONGEST_NAME:
            raise ValueError(f"a path has at most {LONGEST_PATH:,} bytes, and each file name at most {LONGEST_NAME}")
        try:
            Path(value).expanduser()
        except RuntimeError:
            raise ValueError(f"there is no user {value.partition('/')[0][1:]}") from None
    return value

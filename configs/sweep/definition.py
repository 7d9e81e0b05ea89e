"""What a sweep is: a set of runs planned together, and the rules for their sizes, budgets and learning rates."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs.base import ConfigError, Section, Size, file_path
from configs.load import merge, override, preset_names, read_mapping, validated
from configs.reading.parse import MAX_DEPTH, is_file, shortened
from configs.sections.model import MOST_LAYERS
from configs.sections.run import Config, folder_name

from .designs import (
    DESIGNS,
    MOST_TRIALS,
    Axis,
    Design,
    GridDesign,
    IsoflopDesign,
    LadderDesign,
    OptunaDesign,
    RandomDesign,
    listed,
)
from .variants import Variant

Count = Literal["total", "active", "without_embeddings", "with_head"]
"""How parameters are counted. active: top_k of the experts plus everything else; without_embeddings: active less
embedding and head; with_head: active less the embedding if the head has a matrix of its own, which is what each token
is multiplied by."""


class ShapeRule(Section):
    """How a parameter count becomes a shape: the nearest of the widths and depths that the rule allows."""

    head_dim: Size = 64
    """model.hidden_size is a multiple of this, with one head per multiple."""
    kv_group: Size = 1
    """Query heads per key/value head."""
    aspect_ratio: float = Field(64.0, ge=1e-3, le=1e6)
    """model.hidden_size / model.num_layers (Kaplan et al., arXiv:2001.08361, fig. 5: a broad optimum)."""
    slack: float = Field(0.25, ge=0)
    """How far, as a fraction, the number of layers may deviate from that ratio to match a size more closely; at least
    one layer."""
    min_layers: int = Field(2, gt=0, le=MOST_LAYERS)
    """Minimum number of layers."""
    ffn_ratio: float = Field(8 / 3, gt=0, le=1000)
    """Width of a dense SwiGLU layer / model.hidden_size."""
    ffn_multiple: Size = 64
    """The width is rounded up to a multiple of this."""


class HyperRules(Section):
    """How learning rate, batch and schedule follow from a trial's size and tokens. None: where the design chooses sizes
    (isoflop, ladder) the default given below, in a search the config's value."""

    lr: Literal["step_law", "inverse_width", "fixed"] | None = None
    """Step Law (arXiv:2503.04715), the default; inverse_width: scales the config's optim.lr, as muP does for hidden
    matrices; fixed: optim.lr."""
    lr_scale: tuple[PositiveFloat, ...] = Field((1.0,), min_length=1)
    """Factors on the rule's learning rate, each a trial of its own: a small tuning grid."""
    max_lr: PositiveFloat = 0.02
    """Upper bound on Step Law's learning rate: it was fitted to larger models than a laptop trains."""
    base_width: PositiveInt | None = None
    """inverse_width: the width that optim.lr is right for; None: the config's model.hidden_size."""
    batch: Literal["step_law", "fixed"] | None = None
    """Tokens per step: Step Law's, the default, or train.global_batch * train.seq_len."""
    warmup: float | None = Field(None, ge=0, lt=1)
    """Warmup as a fraction of the steps; default 0.05, also in a search with a budget."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "wsd_branches"] | None = None
    """Default cosine. wsd_branches: trials that differ only in tokens start from the previous one, where its decay
    began."""
    decay: float = Field(0.2, gt=0, lt=0.5)
    """wsd and wsd_branches: fraction of the steps in which the learning rate decays."""

    _lists = field_validator("lr_scale", mode="before")(listed)


class SweepConfig(Section):
    """A sweep: one design, crossed with `variants`, the values of `axes` and `seeds`."""

    name: str = "sweep"
    """Name of the sweep's folder."""
    root: str = "runs"
    """Parent folder of it."""
    base: str = "quickstart"
    """Preset or YAML file that every trial is based on; a path is relative to the sweep's file."""
    set: dict[str, Any] = {}
    """Config keys of every trial on top of base, nested or dotted."""
    isoflop: IsoflopDesign | None = None
    """Design: several sizes at each compute budget."""
    ladder: LadderDesign | None = None
    """Design: sizes x tokens per parameter."""
    grid: GridDesign | None = None
    """Design: every combination of axes."""
    random: RandomDesign | None = None
    """Design: random search over axes."""
    optuna: OptunaDesign | None = None
    """Design: Optuna's search over axes."""
    axes: dict[str, Axis] = {}
    """Config keys and their values: [1e-3, 2e-3], or for a search {low: 1e-4, high: 1e-2, log: true}."""
    variants: dict[str, Variant] = {}
    """Architectures to compare, by name; empty: dense if the design chooses sizes, else the config's own."""
    count: Count = "active"
    """How parameters are counted, for sizes and tokens per parameter."""
    shape: ShapeRule = ShapeRule()
    """How a size becomes a width and a depth."""
    rules: HyperRules = HyperRules()
    """Learning rate, batch and schedule of a trial."""
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    """Each trial is run once per seed (run.seed)."""

    _plain = field_validator("name")(folder_name)
    _paths = field_validator("root", "base")(file_path)
    _lists = field_validator("seeds", mode="before")(listed)

    @field_validator("variants")
    @classmethod
    def _plain_variants(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        for name in variants:
            folder_name(name)
        return variants

    @field_validator("axes", mode="before")
    @classmethod
    def _dotted_axes(cls, value: Any) -> Any:
        return dict(_flat(value)) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in DESIGNS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a sweep has exactly one design of {', '.join(DESIGNS)}: this one has {' and '.join(given) or 'none'}"
            )
        if not self.sizes_chosen and not self.axes and not self.variants:
            raise ValueError(
                f"{given[0]} searches over axes, but there are none: add some, such as axes.optim.lr=[1e-3, 2e-3]"
            )
        for key, axis in self.axes.items():
            if axis.values is None and given[0] not in ("random", "optuna"):
                raise ValueError(f"axes.{key} is a range, but {given[0]} needs a list of values, such as [1, 2]")
        if self.optuna and len(self.optuna.budget or ()) > 1:
            raise ValueError("optuna compares trials of one budget: give optuna.budget one value")
        if (many := self._trials()) > MOST_TRIALS:
            raise ValueError(
                f"the sweep has {many:,} trials ({given[0]} times variants, axes, rules.lr_scale and seeds): at "
                f"most {MOST_TRIALS:,}"
            )
        return self

    def _trials(self) -> int:
        design = self.design
        if isinstance(design, IsoflopDesign):
            many = len(design.budgets) * (len(design.parameters) if design.parameters else design.sizes)
        elif isinstance(design, LadderDesign):
            many = len(design.parameters) * len(design.tokens_per_parameter)
        else:
            many = (design.n if isinstance(design, RandomDesign) else 1) * len(design.budget or (None,))
        if not isinstance(design, RandomDesign):
            many *= math.prod(len(axis.values or ()) for axis in self.axes.values())
        many *= sum(len(variant.choices()) for variant in self.variants.values()) or 1
        return many * len(self.rules.lr_scale) * len(self.seeds)

    @property
    def design(self) -> Design:
        return next(design for name in DESIGNS if (design := getattr(self, name)) is not None)

    @property
    def sizes_chosen(self) -> bool:
        """Whether the design chooses the shapes of the trials, rather than base, set and axes."""
        return self.isoflop is not None or self.ladder is not None

    @property
    def folder(self) -> Path:
        return Path(self.root).expanduser() / self.name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys of a mapping, nested down to lists and ranges."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not value.keys() & Axis.model_fields.keys():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(keys: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """`{"optim.lr": 1, "train": {"steps": 2}}` as sections: `{"optim": {"lr": 1}, "train": {"steps": 2}}`.

    Args:
        depth: current nesting level.

    Raises:
        ConfigError: they are nested too deep.
    """
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        parts = key.split(".")
        if depth + len(parts) > MAX_DEPTH:
            raise ConfigError(f"{shortened(key, 60)} is nested over {MAX_DEPTH} levels deep")
        inner = nested(value, depth + len(parts)) if isinstance(value, Mapping) and value else value
        for part in reversed(parts):
            inner = {part: inner}
        merge(tree, inner)
    return tree


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> SweepConfig:
    """Read a sweep's YAML file.

    Args:
        overrides: `section.key=value`, as in `configs.load`.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value out of range.
    """
    return sweep_from_dict(read_sweep(path, overrides), where=str(path))


def read_sweep(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """As `load_sweep`, the keys alone, not validated yet; `base` is relative to the working directory."""
    path = Path(path)
    if not is_file(path):
        name = shortened(repr(str(path)), 120)
        raise ConfigError(f"no sweep {name}: expected a YAML file with a design ({', '.join(DESIGNS)})")
    tree = read_mapping(path)
    if tree.keys() & Config.model_fields.keys() and not tree.keys() & set(DESIGNS):
        raise ConfigError(
            f"{path} is a run's config, not a sweep: train it with `muster train {path}`, or name it as the base "
            "of a sweep"
        )
    override(tree, overrides, SweepConfig, "isoflop.sizes=7")
    base = tree.get("base")
    if isinstance(base, str) and base not in preset_names() and is_file(path.parent / base):
        tree["base"] = str(path.parent / base)
    return tree


def sweep_from_dict(tree: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Validate a nested mapping. Raises ConfigError with the key, what was given and what would be right."""
    return validated(SweepConfig, tree, where)

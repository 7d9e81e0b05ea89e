"""The arms of a sweep: each architecture and combination of axis values, as config keys over its base."""

import copy
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from configs import Config, ConfigError, from_dict, resolve
from configs.load import merge, read_tree
from configs.reading.parse import shortened
from configs.sweep.definition import SweepConfig, nested
from configs.sweep.variants import Experts, Variant
from models.planning.cost import has_formulas
from trainer.run.plugins import load_plugins

from .rules import Rules

SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
EXPERTS = ("num_experts", "top_k", "expert_size", "shared_expert_size")


class Arm(NamedTuple):
    """One architecture with its axis values, trained at several sizes or budgets."""

    name: str
    key: str
    """Its key in `variants`; "" if there are none."""
    variant: str
    """The key, with a suffix if the variant lists several choices of experts."""
    experts: Experts | None
    tree: dict[str, Any]
    """base, set, the variant's set and the axis values, as nested keys."""
    config: Config
    """The same, validated."""
    values: dict[str, Any]
    """Axis values by config key."""


def arms(sweep: SweepConfig) -> list[Arm]:
    """Every variant; in a design that trains every axis value, each variant with every combination of them.

    Raises:
        ConfigError: base, set, a variant's set or an axis is invalid, or sets what the sweep itself chooses.
    """
    base = read_tree(sweep.base)
    if plugins := from_dict(base, where=f"base {sweep.base}").plugins:
        load_plugins(plugins)
        from_dict(base, where=f"base {sweep.base}")  # now that its family's keys are known
    refuse_chosen(sweep, nested(sweep.set), "set")
    tree = merge(base, nested(sweep.set))
    from_dict(tree, where="set")
    found = []
    variants = sweep.variants or {"dense" if sweep.sizes_chosen else "": Variant()}
    for key, variant in variants.items():
        refuse_chosen(sweep, nested(variant.set), f"variants.{key}.set")
        own = merge(copy.deepcopy(tree), nested(variant.set))
        config = from_dict(own, where=f"variants.{key}.set")
        if sweep.sizes_chosen and config.train.early_stop.patience:
            raise ConfigError(
                "train.early_stop.patience would end trials before they have spent their budget: set it to null"
            )
        for label, experts in variant.choices().items():
            arm = Arm(key + label, key, key + label, experts, own, config, {})
            if sweep.variants and not sweep.sizes_chosen:
                mixed = merge(copy.deepcopy(own), {"model": _expert_keys(config, experts, key)})
                arm = arm._replace(tree=mixed, config=from_dict(mixed, where=f"variants.{key}"))
            combined = sweep.random is None and sweep.optuna is None
            found += [with_values(sweep, arm, values) for values in _combinations(sweep)] if combined else [arm]
    return found


def base_width(sweep: SweepConfig) -> int:
    """The hidden size that the config's optim.lr is tuned for, under rules.lr=inverse_width."""
    tree = merge(read_tree(sweep.base), nested(sweep.set))
    own: int = getattr(from_dict(tree, where="set").model, "hidden_size", 1)
    return sweep.rules.base_width or own


def with_values(sweep: SweepConfig, arm: Arm, values: Mapping[str, Any]) -> Arm:
    """The arm with one value of each axis. Raises ConfigError that names the axis."""
    tree = copy.deepcopy(arm.tree)
    for key, value in values.items():
        refuse_chosen(sweep, nested({key: value}), "axes")
        merge(tree, nested({key: copy.deepcopy(value)}))
    where = shortened("axes " + ", ".join(f"{key}={value}" for key, value in values.items()), 200)
    config = from_dict(tree, where=where) if values else arm.config
    labels = [_label(sweep, key, value) for key, value in values.items()]
    name = "-".join(filter(None, [arm.name, *labels]))
    return arm._replace(name=name, tree=tree, config=config, values=dict(values))


def chosen(sweep: SweepConfig) -> dict[str, str]:
    """{config key: the part of the sweep that sets it}."""
    found = {"run.name": "name", "run.root": "root", "run.seed": "seeds"} | Rules.of(sweep).keys()
    if sweep.sizes_chosen:
        found |= {f"model.{key}": "shape" for key in SHAPE} | {"train.steps": "the design"}
    elif getattr(sweep.design, "budget", None):
        found["train.steps"] = "the design's budget"
    if sweep.variants or sweep.sizes_chosen:
        found |= {f"model.{key}": "variants" for key in EXPERTS}
    return found


def refuse_chosen(sweep: SweepConfig, tree: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if keys set what the sweep chooses itself; it names the part of the sweep that does."""
    given = _dotted(tree)
    for key, by in chosen(sweep).items():
        if key in given:
            instead = f"set {by.split('=')[0]}=fixed to keep your own" if by.endswith("step_law") else "leave it out"
            raise ConfigError(f"{where}: {key} is already set by the sweep ({by}): {instead}")


def blame(sweep: SweepConfig, arm: Arm, message: str) -> str:
    """A last line for a message: which key of the sweep set each config key in it; "" if none did."""
    variant = sweep.variants.get(arm.key, Variant())
    sources = [(by, {key}) for key, by in chosen(sweep).items()] + [(f"axes.{key}", {key}) for key in arm.values]
    sources.append((f"variants.{arm.key}.set", set(_dotted(nested(variant.set)))))
    sources.append(("set", set(_dotted(nested(sweep.set)))))
    sources.append((f"base={sweep.base}", set(_dotted(read_tree(sweep.base)))))
    named = dict.fromkeys(re.findall(r"\b(?:model|train|optim|data|parallel|cluster|checkpoint)\.[a-z_]+", message))
    found = []
    for key in named:
        setters = [name for name, keys in sources if any(f"{each}.".startswith(f"{key}.") for each in keys)]
        found += [f"{key} comes from {setters[0]}"] if setters else []
    return f"\n({'; '.join(found)})" if found else ""


def resolved(sweep: SweepConfig, arm: Arm, config: Config, vocab_size: int, name: str) -> Config:
    """The trial's resolved config. Raises ConfigError that names the trial and the sweep's keys."""
    try:
        return resolve(config, vocab_size=vocab_size)[0]
    except ConfigError as error:
        raise ConfigError(f"trial {name}: {error}{blame(sweep, arm, str(error))}") from None


def _expert_keys(config: Config, experts: Experts | None, variant: str) -> dict[str, Any]:
    """The expert keys of a model that keeps the config's shape."""
    if not has_formulas(config.model):
        if experts:
            raise ConfigError(f"variants.{variant}: model.family={config.model.family} has no experts")
        return {}
    if not experts:
        return {"num_experts": 0, "shared_expert_size": 0}
    width = config.model.intermediate_size or -(-8 * config.model.hidden_size // 3 // 64) * 64
    if width % experts.granularity:
        raise ConfigError(
            f"variants.{variant}.granularity={experts.granularity} does not divide the width of the dense layer, "
            f"model.intermediate_size ({width})"
        )
    size = width // experts.granularity
    return {"num_experts": experts.num_experts, "top_k": experts.top_k, "expert_size": size,
            "shared_expert_size": size * experts.shared}  # fmt: skip


def _combinations(sweep: SweepConfig) -> list[dict[str, Any]]:
    lists = [axis.values or () for axis in sweep.axes.values()]
    return [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*lists)]


def _label(sweep: SweepConfig, key: str, value: Any) -> str:
    """An axis value as part of a folder's name, such as lr0.001; "" if the axis has only one value."""
    axis = sweep.axes.get(key)
    if axis and axis.values and len(axis.values) == 1:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._]+", "_", f"{key.rpartition('.')[2]}{text}".replace("+", "")).strip("_")


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found

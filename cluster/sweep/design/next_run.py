"""The config of the next run: the size, tokens and experts that a fit says are best, as an ordinary run."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from configs import Config, ConfigError, to_yaml
from configs.sweep.definition import Count, SweepConfig
from configs.sweep.variants import Experts
from configs.units import scientific

from .arms import Arm, arms, base_width
from .cells import cell_of, sizer
from .plan import trials_of
from .sizes import conventions
from .trial import Trial

if TYPE_CHECKING:
    from models.scaling.predictions import Prediction

FAR = 0.15
"""Relative difference between the nearest shape and what was asked for above which the user is told."""


class Best(NamedTuple):
    """What is predicted to be best for a budget."""

    n: float
    """Parameters, counted as `convention` says."""
    d: float
    """Training tokens; a given `budget` decides instead."""
    experts: int = 1
    """As model.num_experts counts them; 1: dense."""
    top_k: int = 1
    convention: str = "active"
    granularity: int | None = None
    """Width of the dense layer / width of an expert; None: the sweep's variant's."""

    @classmethod
    def of(cls, predicted: "Prediction") -> "Best":
        """What a law predicts. Raises ConfigError if it names no best size."""
        if predicted.unnamed:
            raise ConfigError(f"{predicted.unnamed}, or assume a form, such as --form approach3")
        experts, top_k = int(predicted.shape.get("experts", 1)), int(predicted.shape.get("top_k", 1))
        granularity = predicted.shape.get("granularity")
        split = None if granularity is None or experts == 1 else round(granularity)
        return cls(predicted.n.value, predicted.d.value, experts, top_k, predicted.convention, split)


def config_for(
    sweep: SweepConfig,
    *,
    n: float,
    d: float,
    experts: int = 1,
    top_k: int = 1,
    budget: float | None = None,
    convention: str = "active",
    vocab_size: int,
    granularity: int | None = None,
) -> Config:
    """A run of about `n` parameters whose exact training FLOPs are within 1% of the budget; see `next_trial`."""
    best = Best(n, d, experts, top_k, convention, granularity)
    return next_trial(sweep, best, vocab_size, budget)[0].config


def next_trial(
    sweep: SweepConfig, best: Best, vocab_size: int, budget: float | None = None
) -> tuple[Trial, tuple[str, ...]]:
    """The run as a trial of the sweep, with its shape rule, its rules for learning rate and batch, and its topology.

    Args:
        budget: training FLOPs; None: those of `best.d` tokens.

    Returns:
        The trial, in a folder of its own under the sweep's root; and notes for the user, a line each.

    Raises:
        ConfigError: no shape or no whole number of steps fits, or the sweep trains no such architecture.
    """
    if best.convention not in get_args(Count):
        raise ConfigError(
            f"parameters counted as {best.convention!r} determine no shape: say how the table counts them, "
            f"{', '.join(get_args(Count))}"
        )
    arm = _arm(sweep, best)
    found = sizer(sweep.model_copy(update={"count": best.convention}), arm, vocab_size)
    keys = found.shape(best.n)
    tokens = budget / found.flops(keys) if budget else best.d
    spent = tokens * found.flops(keys)
    cell = cell_of(arm, f"{sweep.name}-next-{scientific(spent)}", keys, found, spent)
    alone = sweep.model_copy(update={"seeds": sweep.seeds[:1]})
    trial = trials_of(alone, [cell], vocab_size, base_width(alone), seed=sweep.seeds[0])[0]
    run = trial.config.run.model_copy(update={"root": sweep.root})
    trial = trial._replace(config=trial.config.model_copy(update={"run": run}))
    notes = []
    got = conventions(trial.counts)[best.convention]
    if abs(off := got / best.n - 1) > FAR:
        notes.append(f"the nearest shape has {got:,} {best.convention} parameters, {off:+.0%} from the predicted best")
    if budget and abs(trial.tokens / best.d - 1) > FAR:
        notes.append(f"the budget gives this shape {trial.tokens:.4g} tokens; {best.d:.4g} are predicted to be best")
    return trial, tuple(notes)


def write(trial: Trial, path: Path | None, notes: tuple[str, ...] = ()) -> str:
    """The config as YAML that `muster train` and `muster plan` take; also into a file if a path is given.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = "".join(f"# {note}\n" for note in notes) + to_yaml(trial.config)
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"-o {path}: {error.strerror or error}") from None
    return text


def _arm(sweep: SweepConfig, best: Best) -> Arm:
    """The sweep's architecture closest to what is asked for, with the experts asked for."""
    sized = sweep.model_copy(update={"axes": {}})
    known = arms(sized)
    dense = best.experts <= 1
    fitting = [arm for arm in known if (arm.experts is None) == dense]
    if not fitting:
        names = ", ".join(arm.name or "its base" for arm in known)
        raise ConfigError(
            f"experts={best.experts}: the sweep trains {names}, but no "
            f"{'dense model' if dense else 'Mixture of Experts'}: add one to variants"
            f"{', such as dense={}' if dense else ''}"
        )
    if dense:
        return fitting[0]

    def unlike(arm: Arm) -> tuple[int, int]:
        assert arm.experts
        return abs(arm.experts.num_experts - best.experts), abs(arm.experts.top_k - best.top_k)

    arm = min(fitting, key=unlike)
    assert arm.experts
    experts = Experts(best.experts, best.top_k, best.granularity or arm.experts.granularity, arm.experts.shared)
    if experts.top_k > experts.num_experts:
        raise ConfigError(f"top_k={experts.top_k} is over experts={experts.num_experts}")
    return arm._replace(experts=experts, name=f"{arm.key}-next")

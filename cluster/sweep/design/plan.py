"""The trials of a sweep: their configs, exact FLOPs and order, a pure function of the sweep (no torch)."""

import copy
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from configs import ConfigError, from_dict
from configs.load import merge
from configs.sweep.definition import SweepConfig
from configs.units import scientific

from .arms import arms, base_width, resolved
from .cells import Cell, as_it_stands, drawn, sized_cells
from .doubts import doubts
from .measures import measures_of
from .rules import Rules, course, learning_rate, rounded, step_law_batch
from .sizes import TOLERANCE, batch_and_steps, conventions
from .trial import Plan, Trial

__all__ = ["Plan", "Trial", "plan", "trials_of"]


def plan(sweep: SweepConfig, vocab_size: int, losses: Mapping[str, float] | None = None) -> Plan:
    """Every trial of a sweep.

    Args:
        vocab_size: the tokenizer's size, for models that name none.
        losses: held-out loss of each finished trial, by name; NaN: it failed for good. An Optuna search draws its next
            trials from them, and warnings use them; the trials of other designs do not depend on them.

    Raises:
        ConfigError: a trial cannot run, or no whole number of steps spends its budget within 1%.
    """
    losses = losses or {}
    found: list[Trial] = []
    left = 0
    if sweep.sizes_chosen:
        cells = sized_cells(sweep, arms(sweep), vocab_size)
    else:
        named, left = drawn(sweep, losses)
        cells = [cell for name, arm in named for cell in as_it_stands(sweep, arm, name, vocab_size)]
    width = base_width(sweep)
    for chain, scale, seed in itertools.product(_chains(sweep, cells), sweep.rules.lr_scale, sweep.seeds):
        found += trials_of(sweep, chain, vocab_size, width, scale, seed)
    names = Counter(trial.name for trial in found)
    if twice := next((name for name, times in names.items() if times > 1), None):
        raise ConfigError(f"two trials would be named {twice}: a value or size of the sweep is listed twice")
    trials = tuple(found)
    return Plan(sweep, vocab_size, trials, tuple(doubts(sweep, trials, losses)), left)


def _chains(sweep: SweepConfig, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share a run's stable phase, in order of their tokens; without wsd_branches each is alone."""
    if sweep.rules.schedule != "wsd_branches":
        return [[cell] for cell in cells]
    chains: dict[tuple, list[Cell]] = defaultdict(list)
    for cell in cells:
        chains[(cell.arm.name, *sorted(cell.keys.items()))].append(cell)
    if not any(len(chain) > 1 for chain in chains.values()):
        raise ConfigError(
            "rules.schedule=wsd_branches needs sizes that are trained on several numbers of tokens: a ladder with "
            "several tokens_per_parameter, or isoflop.parameters at several budgets; otherwise set rules.schedule=wsd"
        )
    return [sorted(chain, key=lambda cell: cell.sequences) for chain in chains.values()]


def trials_of(
    sweep: SweepConfig, chain: list[Cell], vocab_size: int, width: int, scale: float = 1.0, seed: int = 0
) -> list[Trial]:
    """The trials of one chain, in order. They share batch, learning rate and warmup, which are chosen for the geometric
    mean of their tokens.

    Args:
        width: see `base_width`.
    """
    rules, first = Rules.of(sweep), chain[0]
    config = first.arm.config
    sized, train = config.model_copy(update={"model": first.model}), config.train
    counts, _, units = measures_of(sized)
    tokens = math.exp(sum(math.log(cell.sequences * units) for cell in chain) / len(chain))
    n = conventions(counts)["without_embeddings"]
    fixed = rules.batch == "fixed"
    wanted = train.global_batch if fixed else step_law_batch(tokens) / units
    multiple = config.parallel.dp * (train.micro_batch or 1)
    found = batch_and_steps([cell.sequences for cell in chain], wanted, multiple, fixed=fixed)
    if found is None:
        raise ConfigError(_no_steps(chain, wanted, fixed, multiple))
    batch, steps = found
    lr = rounded(scale * learning_rate(rules.lr, sweep.rules, sized, width, n, tokens))
    trials: list[Trial] = []
    after: tuple[str, int] | None = None
    for i, (cell, each) in enumerate(zip(chain, steps, strict=True)):
        branch = rules.schedule == "wsd_branches" and i + 1 < len(chain)
        path = course(rules, sweep.rules.decay, each, steps[0], config.checkpoint.every, branch)
        if after and path.stable < after[1]:
            raise ConfigError(
                f"rules.schedule=wsd_branches: {cell.name} decays from step {path.stable}, before the branch at step "
                f"{after[1]}: ask for tokens that are further apart, or lower rules.decay"
            )
        name = cell.name + (f"-lrx{scale:g}" if len(sweep.rules.lr_scale) > 1 else "")
        name += f"-s{seed}" if len(sweep.seeds) > 1 else ""
        tree = copy.deepcopy(cell.arm.tree)
        chosen = {
            "run": {"name": name, "root": str(sweep.folder / "trials"), "seed": seed},
            "model": cell.keys,
            "train": {"steps": each, "global_batch": batch},
            "optim": {"lr": lr} | path.optim,
            "checkpoint": path.checkpoint,
        }
        asked = from_dict(merge(tree, {key: keys for key, keys in chosen.items() if keys}), where=f"trial {name}")
        used = resolved(sweep, cell.arm, asked, vocab_size, name)
        read = each * batch * units
        trials.append(
            Trial(
                name=name,
                variant=cell.arm.variant,
                budget=cell.budget,
                flops=cell.flops_per_token * read,
                tokens=read,
                counts=measures_of(used).counts,
                config=asked,
                resolved=used,
                after=after[0] if after else None,
                from_step=after[1] if after else None,
                values=cell.arm.values,
            )
        )
        after = (name, path.stable) if branch else None
    return trials


def _no_steps(chain: list[Cell], wanted: float, fixed: bool, multiple: int) -> str:
    cell = min(chain, key=lambda each: each.sequences)
    asked = f"{scientific(cell.budget)} FLOPs" if cell.budget else "its tokens"
    start = f"{cell.name}: {asked} are {cell.sequences:.4g} sequences of {cell.arm.config.train.seq_len} tokens"
    if fixed:
        return (
            f"{start}, {cell.sequences / wanted:.4g} steps of train.global_batch={wanted:g}, and no whole number of "
            f"steps is within {TOLERANCE:.0%} of that: lower train.global_batch, raise the budget, or set "
            "rules.batch=step_law"
        )
    return (
        f"{start}, and no whole number of steps with a batch that is a multiple of {multiple} is within "
        f"{TOLERANCE:.0%} of that: raise the budget, or lower train.seq_len, train.micro_batch or parallel.dp"
    )

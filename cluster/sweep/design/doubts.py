"""Possible problems of a plan, as warnings: none of them keeps a trial from running."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from configs import counted
from configs.sweep.definition import SweepConfig
from configs.units import scientific, short
from models.planning.cost import has_formulas

from .rules import STEP_LAW_D, STEP_LAW_N, Rules, step_law_batch
from .sizes import conventions
from .trial import Trial

FEW_STEPS = 100
"""With fewer steps a schedule is mostly warmup and decay."""
LARGE_BATCH = 4.0
"""Multiple of Step Law's batch; its optimum is flat within about a factor of two."""
SIDE = 3
"""Sizes that a parabola needs on each side of the optimum; one at the optimum counts for both."""
AT = 0.2
"""Difference in ln N within which a size counts as at the optimum."""
CROWDED = 0.4
"""Fraction of an even spacing below which two sizes are nearly the same."""
UNEQUAL = 0.05
"""Relative difference in parameters above which architectures do not count as equal in size."""
EPOCHS = 4.0
"""Up to this many, repeated data are worth nearly as much as new data (Muennighoff et al., arXiv:2305.16264)."""

Optimum = Callable[[str, float], float | None]
"""(variant, budget) to the best number of parameters, counted as sweep.count says; None: unknown."""


def doubts(sweep: SweepConfig, trials: Sequence[Trial], losses: Mapping[str, float]) -> list[str]:
    """Warnings, a line each."""
    found = []
    if sweep.isoflop:
        source = f"{sweep.isoflop.tokens_per_parameter:g} tokens per parameter"
        found += off_centre(sweep, trials, _by_tokens(sweep, trials), source)
        found += _best_at_edge(sweep, trials, losses)
        if len(sweep.isoflop.budgets) < 3:
            found.append(
                f"isoflop.budgets has {len(sweep.isoflop.budgets)}: a law needs 3, and one more to be scored against"
            )
    if sweep.sizes_chosen:
        found += _crowded(sweep, trials) + _unequal(sweep, trials)
    of_tokens = [trial for trial in trials if has_formulas(trial.resolved.model)]
    found += _batches(of_tokens) + _steps(trials)
    if Rules.of(sweep).lr == "step_law":
        found += _beyond_step_law(sweep, trials)
    return found


def off_centre(sweep: SweepConfig, trials: Iterable[Trial], optimum: Optimum, source: str) -> list[str]:
    """Warnings for budgets whose optimum lies outside their sizes, at the edge, or with few sizes on one side.

    Args:
        source: where the optimum comes from, for the message.
    """
    outside, narrow = [], []
    for (variant, budget), sizes in _curves(sweep, trials).items():
        best = optimum(variant, budget)
        if best is None:
            continue
        where = f"{variant} {scientific(budget)}: {short(best)} in {short(sizes[0])} to {short(sizes[-1])}"
        below, above = (sum(sign * math.log(best / n) >= -AT for n in sizes) for sign in (1, -1))
        if min(below, above) <= 1:
            outside.append(where)
        elif min(below, above) < SIDE:
            narrow.append(where)
    found = []
    if outside:
        found.append(f"off-centre: by {source} the best size is beyond the sizes or at their edge ({_some(outside)}): "
                     "move isoflop.parameters, or widen isoflop.spread")  # fmt: skip
    if narrow:
        found.append(f"off-centre: by {source} fewer than {SIDE} sizes are on one side of the best ({_some(narrow)}): "
                     "raise isoflop.sizes")  # fmt: skip
    return found


def repeated(trials: Iterable[Trial], unique: int) -> list[str]:
    """A warning for trials that read the data too often.

    Args:
        unique: tokens of the training split.
    """
    many = [f"{trial.name}: {trial.tokens / unique:.1f} times" for trial in trials if trial.tokens > EPOCHS * unique]
    if not many:
        return []
    return [f"{counted(len(many), 'trial', 'reads/read')} the {unique:,} training tokens over {EPOCHS:g} times "
            f"({_some(many)}), so their "
            "losses are those of repeated data: prepare more, or lower the budgets"]  # fmt: skip


def _n(sweep: SweepConfig, trial: Trial) -> int:
    return conventions(trial.counts)[sweep.count]


def _curves(sweep: SweepConfig, trials: Iterable[Trial]) -> dict[tuple[str, float], list[int]]:
    """(variant, budget) to sizes, smallest first."""
    curves: dict[tuple[str, float], set[int]] = defaultdict(set)
    for trial in trials:
        curves[trial.variant, trial.budget or 0.0].add(_n(sweep, trial))
    return {key: sorted(sizes) for key, sizes in curves.items()}


def _by_tokens(sweep: SweepConfig, trials: Sequence[Trial]) -> Optimum:
    """The size at which a budget gives the rule's tokens per parameter, inter- or extrapolated from its sizes."""
    assert sweep.isoflop
    rule = math.log(sweep.isoflop.tokens_per_parameter)
    points: dict[tuple[str, float], set[tuple[float, float]]] = defaultdict(set)
    for trial in trials:
        n = _n(sweep, trial)
        points[trial.variant, trial.budget or 0.0].add((math.log(n), math.log(trial.tokens / n)))

    def optimum(variant: str, budget: float) -> float | None:
        line = sorted(points[variant, budget])
        if len(line) < 2:
            return math.exp(line[0][0] + (line[0][1] - rule) / 2)  # D / N falls about as N^-2
        pairs = list(pairwise(line))
        (n0, r0), (n1, r1) = next((pair for pair in pairs if pair[1][1] <= rule), pairs[-1])
        return math.exp(n0 + (r0 - rule) / (r0 - r1) * (n1 - n0)) if r0 != r1 else None

    return optimum


def _best_at_edge(sweep: SweepConfig, trials: Iterable[Trial], losses: Mapping[str, float]) -> list[str]:
    seen: dict[tuple[str, float], list[tuple[float, int]]] = defaultdict(list)
    curves = _curves(sweep, trials := list(trials))
    for trial in trials:
        if not math.isnan(loss := losses.get(trial.name, math.nan)):
            seen[trial.variant, trial.budget or 0.0].append((loss, _n(sweep, trial)))
    edge = []
    for (variant, budget), points in seen.items():
        sizes = curves[variant, budget]
        best = min(points)[1]
        if len({n for _, n in points}) == len(sizes) > 1 and best in (sizes[0], sizes[-1]):
            edge.append(
                f"{variant} {scientific(budget)}: {short(best)}, the {'smallest' if best == sizes[0] else 'largest'}"
            )
    return [f"off-centre: the size with the lowest loss is at the edge of its budget ({_some(edge)})"] if edge else []


def _crowded(sweep: SweepConfig, trials: Iterable[Trial]) -> list[str]:
    """Warnings for sizes that miss those asked for because there is no shape in between."""
    design, near, wide = sweep.isoflop, [], []
    for (variant, budget), sizes in _curves(sweep, trials).items() if design else ():
        whole = math.log(sizes[-1] / sizes[0])
        even = whole / max(1, len(sizes) - 1)
        near += [
            f"{variant} {scientific(budget)}: {short(n)} and {short(m)}"
            for n, m in pairwise(sizes)
            if math.log(m / n) < CROWDED * even
        ]
        asked = 2 * math.log(design.spread) if design and not design.parameters and len(sizes) > 1 else whole
        if whole > asked * (1 + CROWDED):
            wide.append(f"{variant} {scientific(budget)}: {short(sizes[0])} to {short(sizes[-1])}")
    found, remedy = [], "a smaller shape.head_dim, or more shape.slack, leaves more shapes to choose from"
    if near:
        found.append(f"sizes next to each other are nearly the same ({_some(near)}): {remedy}")
    if wide:
        found.append(f"sizes are further apart than isoflop.spread says ({_some(wide)}): {remedy}")
    return found


def _unequal(sweep: SweepConfig, trials: Sequence[Trial]) -> list[str]:
    """Warnings for architectures whose sizes differ from the first one's."""
    curves = _curves(sweep, trials)
    first = trials[0].variant if trials else ""
    worst: dict[str, float] = {}
    for (variant, budget), sizes in curves.items():
        pairs = zip(sizes, curves[first, budget], strict=False) if (first, budget) in curves else ()
        worst[variant] = max([worst.get(variant, 0.0), *(abs(n / m - 1) for n, m in pairs)])
    return [f"the sizes of {variant} differ from those of {first} by up to {off:.0%} in {sweep.count} parameters: a "
            "smaller shape.head_dim or shape.ffn_multiple brings them closer"
            for variant, off in worst.items() if off > UNEQUAL]  # fmt: skip


def _batches(trials: Iterable[Trial]) -> list[str]:
    large = []
    for trial in trials:
        train = trial.config.train
        tokens, best = train.global_batch * train.seq_len, step_law_batch(trial.tokens)
        if tokens > LARGE_BATCH * best:
            large.append(f"{trial.name}: {tokens:,} tokens a step, Step Law {best:,.0f}")
    return [f"{counted(len(large), 'trial', 'has/have')} a batch that is large for their tokens "
            f"({_some(large)}): lower "
            "train.global_batch, train.micro_batch or parallel.dp"] if large else []  # fmt: skip


def _steps(trials: Iterable[Trial]) -> list[str]:
    few = [f"{trial.name}: {trial.config.train.steps}" for trial in trials if trial.config.train.steps < FEW_STEPS]
    return [f"{counted(len(few), 'trial', 'has/have')} fewer than {FEW_STEPS} steps ({_some(few)}): raise the "
            f"budget or lower the "
            "batch"] if few else []  # fmt: skip


def _beyond_step_law(sweep: SweepConfig, trials: Sequence[Trial]) -> list[str]:
    found = []
    sizes = [conventions(trial.counts)["without_embeddings"] for trial in trials]
    tokens = [trial.tokens for trial in trials]
    for name, values, (low, high) in (("N", sizes, STEP_LAW_N), ("D", tokens, STEP_LAW_D)):
        if values and (min(values) < low or max(values) > high):
            found.append(f"{name} from {short(min(values))} to {short(max(values))} ({short(low)} to {short(high)})")
    held = sum(trial.config.optim.lr >= sweep.rules.max_lr for trial in trials)
    if not found:
        return []
    also = f", and rules.max_lr={sweep.rules.max_lr:g} caps {held} of {len(trials)} learning rates" if held else ""
    return [f"Step Law is used outside the range that it was fitted on: {', '.join(found)}{also}; "
            "rules.lr_scale=[0.5, 1, 2] tries its neighbours, rules.lr=fixed uses optim.lr"]  # fmt: skip


def _some(items: Sequence[str], shown: int = 3) -> str:
    return "; ".join(items[:shown]) + (f"; and {len(items) - shown} more" if len(items) > shown else "")

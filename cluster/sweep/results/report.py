"""What `muster sweep fit` and `predict` print."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.table import Table as Grid
from rich.text import Text

from configs import counted
from models.scaling.fitting import Fits, budgets_in_words
from models.scaling.intervals import Interval
from models.scaling.predictions import Prediction, Rival
from trainer.record.terminal import Console


def show_fits(fits: Fits) -> None:
    """Every form with its coefficients and errors, the one chosen, and what was left out."""
    console = Console()
    table = fits.table
    console.print(
        f"{counted(len(table), 'run')} {budgets_in_words(table)}, "
        f"{table.c.min():.3g} to {table.c.max():.3g} "
        f"FLOPs; N counted as {table.convention}",
        soft_wrap=True,
    )
    for name, each in fits.fits.items():
        mark = "  <- chosen" if name == fits.chosen else "  (refused)" if name in fits.refused else ""
        held = "" if each.cross_validation is None else f", on held-back budgets {each.cross_validation:.2%}"
        state = "converged" if each.solution.converged else "not converged"
        console.print(Text.assemble("\n", (name, "bold"), f" ({each.form.source}){mark}"), soft_wrap=True)
        console.print(f"  {each.objective}, {state}; error {each.residual:.2%}{held}", soft_wrap=True)
        grid = Grid(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        for coefficient, value in each.coefficients.items():
            low, high = each.intervals.get(coefficient, (float("nan"),) * 2)
            grid.add_row(f"  {coefficient}", f"{value:.5g}", f"[{low:.5g}, {high:.5g}]")
        console.print(grid)
    if fits.approach2:
        n, d = fits.approach2.n, fits.approach2.d
        console.print(
            Text.assemble(
                ("\napproach 2", "bold"),
                f" (parabolas of {len(fits.approach2.valleys)} budgets): N* ~ C^{n.exponent:.4f} "
                f"(± {n.std:.4f}), D* ~ C^{d.exponent:.4f}",
            ),
            soft_wrap=True,
        )
    if fits.approach1:
        law, of = fits.approach1[0], fits.approach1_of
        told = f" (best run of each budget by {of}): N* ~ C^{law.exponent:.4f}"
        console.print(Text.assemble(("approach 1", "bold"), told))
    if fits.chosen is None and not fits.kinds:
        console.print("\nno form is chosen: each is refused, for the reason below", soft_wrap=True)
    for label, alone in fits.kinds.items():
        console.rule(f"{label} alone", align="left", style="dim")
        show_fits(replace(alone, table=replace(alone.table, excluded=())))
    refused = [*fits.refused.values(), *(fits.approach2.refused if fits.approach2 else ())]
    for refusal in refused:
        console.print(f"refused ({refusal.kind}): {refusal}", soft_wrap=True)
    for why, runs in groups(fits.table.excluded).items():
        named = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
        console.print(f"left out: {named}: {why}", soft_wrap=True)
    for note in table.notes:
        console.print(f"note: {note}", soft_wrap=True)


def groups(excluded: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Runs grouped by the reason why they were left out."""
    found: dict[str, list[str]] = {}
    for run, why in excluded:
        found.setdefault(why, []).append(run)
    return found


def show_predictions(predictions: Sequence[Prediction], notes: Sequence[str] = ()) -> None:
    """Print a row for each budget or model, then warnings and the notes of the table that they are based on."""
    console = Console()
    console.print(
        f"by {predictions[0].form}, N counted as {predictions[0].convention}; 95% intervals in brackets", soft_wrap=True
    )
    grid = Grid(
        "FLOPs", "loss", "of one run", "N", "D", "D / N", "model", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for each in predictions:
        grid.add_row(f"{each.budget:.3g}", _range(each.loss, ".4f"), _ends(each.run_loss, ".4f"), *_choice(each))
        for rival in each.rivals:
            grid.add_row("  or", _range(rival.loss, ".4f"), "", *_choice(rival))
    console.print(grid)
    if any(each.rivals for each in predictions):
        console.print("or: kinds of models that cannot be distinguished from the best one", soft_wrap=True)
    for warning in dict.fromkeys(warning for each in predictions for warning in each.warnings):
        console.print(f"warning: {warning}", soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)


def _choice(found: Prediction | Rival) -> tuple[str, str, str, str]:
    """N, D, their ratio and the kind of model."""
    shape = " ".join(f"{key}={value:g}" for key, value in found.shape.items() if key != "active_ratio")
    ratio = "" if np.isnan(found.n.value) else f"{found.d.value / found.n.value:.3g}"
    return _range(found.n, ".3g"), _range(found.d, ".3g"), ratio, shape


def _range(estimate: Interval, digits: str) -> str:
    if estimate.low == estimate.high:
        return f"{estimate.value:{digits}}"
    if np.isnan(estimate.value):
        return _ends(estimate, digits)
    return f"{estimate.value:{digits}} {_ends(estimate, digits)}"


def _ends(estimate: Interval, digits: str) -> str:
    return f"[{estimate.low:{digits}}, {estimate.high:{digits}}]"

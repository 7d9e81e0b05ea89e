"""The picture of a loss landscape: a curve, or contours with the path of the run's checkpoints."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.observe.landscape import Landscape

from .draw import BLUE, ORANGE, own_style

LEVELS = 24


def plot_landscape(found: Landscape, file: Path) -> None:
    """Draw it as a PNG. Raises OSError."""
    with own_style():
        figure = Figure(figsize=(6.4, 4.6))
        axes = figure.add_subplot()
        losses = np.ma.masked_invalid(np.array(found.loss, float))
        if losses.ndim == 1:
            axes.plot(found.axes[0], losses, color=BLUE)
            axes.plot(0, np.interp(0, found.axes[0], losses.filled(np.nan)), "o", color=ORANGE)
            axes.set_ylabel("held-out loss")
        else:
            low, high = losses.min(), losses.max()
            # Closer together near the minimum, where the shape is.
            levels = low + (high - low) * np.linspace(0, 1, LEVELS) ** 2 if high > low else [low, low + 1e-9]
            filled = axes.contourf(*found.axes, losses, levels=levels, cmap="viridis")
            axes.contour(*found.axes, losses, levels=levels, colors="white", linewidths=0.3)
            figure.colorbar(filled, ax=axes, label="held-out loss", format="%.3g")
            axes.grid(visible=False)
            axes.plot(0, 0, "o", color=ORANGE, markersize=6)
        if found.path:
            _, x, y = zip(*found.path, strict=True)
            axes.plot(x, y, "o-", color=ORANGE, markersize=3, linewidth=1)
            for number in {0, len(found.path) - 1}:
                step, *place = found.path[number]
                name = f"step {step:,}"
                axes.annotate(name, (place[0], place[1]), (4, 4), textcoords="offset points", color="white")
            first, second = (f"({share:.0%} of the variance)" for share in found.explained)
            axes.set_xlabel(f"principal component 1 {first}")
            axes.set_ylabel(f"principal component 2 {second}")
        else:
            axes.set_xlabel("distance along a random direction, in sizes of the weights")
            if losses.ndim == 2:
                axes.set_ylabel("along another")
        axes.set_title(f"{found.run}: step {found.step:,}, {found.examples:,} held-out examples", loc="left")
        FigureCanvasAgg(figure).print_png(str(file))

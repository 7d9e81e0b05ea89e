"""Figures as files: a PNG of each for print, and one interactive HTML page of all, by plotly."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from trainer.observe.plots.draw import own_style

from .figures import Mark, Picture, contour_levels, ends_of, paper

SHAPES = {"o": "circle", "D": "diamond", "x": "x"}
"""Plotly's names for matplotlib's markers."""


def save(pictures: Sequence[Picture], folder: Path, page: str) -> list[Path]:
    """Write a PNG of each picture and one self-contained HTML page of all. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures:
        with own_style():
            figure = paper(picture)
            FigureCanvasAgg(figure)
            written.append(folder / f"{picture.name}.png")
            figure.savefig(written[-1])
    written.append(folder / page)
    written[-1].write_text("".join(_page(pictures)), encoding="utf-8")
    return written


def _page(pictures: Sequence[Picture]) -> Iterator[str]:
    """HTML that includes plotly's script, so that it opens without a network, also from an artifact store."""
    yield "<!DOCTYPE html><html><head><meta charset='utf-8'><title>Sweep</title></head>"
    yield "<body style='font-family: sans-serif; max-width: 1200px; margin: auto'>"
    for i, picture in enumerate(pictures):
        yield f"<p>{escape(picture.caption)}</p>"
        yield _screen(picture).to_html(full_html=False, include_plotlyjs=i == 0)
    yield "</body></html>\n"


def _html(text: str) -> str:
    """A label for plotly, which knows neither mathtext nor newlines."""
    return re.sub(r"\$10\^\{(-?\d+)\}\$", r"10<sup>\1</sup>", text).replace("\n", "<br>")


def _screen(picture: Picture) -> Any:
    from plotly.graph_objects import Figure as Screen
    from plotly.subplots import make_subplots

    figure: Screen = make_subplots(
        rows=1, cols=len(picture.panels), subplot_titles=[p.title for p in picture.panels], shared_yaxes=True
    )
    seen: set[str] = set()
    for column, (panel, limits) in enumerate(zip(picture.panels, ends_of(picture), strict=True), 1):
        for mark in panel.marks:
            for trace in _traces(mark, mark.label if mark.label not in seen else ""):
                figure.add_trace(trace, row=1, col=column)
            seen.add(mark.label)
        labels = panel.x, (panel.y[0] if column == 1 else "", panel.y[1])
        for update, (label, scale), ends in zip(
            (figure.update_xaxes, figure.update_yaxes), labels, limits, strict=True
        ):
            linear = scale == "share"
            update(
                type="linear" if linear else "log", nticks=7 if len(picture.panels) == 1 else 4, tickangle=0,
                title_text=label, row=1, col=column,
                range=ends if linear else [float(np.log10(end)) for end in ends], ticks="outside",
                exponentformat="B" if scale == "count" else "power", tickformat="+.1%" if linear else None,
            )  # fmt: skip
    figure.update_layout(
        template="simple_white", height=400, margin={"t": 40, "b": 60}, legend_title_text=_html(picture.legend),
    )  # fmt: skip
    return figure


def _traces(mark: Mark, label: str) -> list[Any]:
    from plotly.graph_objects import Contour, Scatter

    name = _html(mark.label)
    common = {"name": name, "legendgroup": name or None, "showlegend": bool(label)}
    x, y = mark.x.tolist(), mark.y.tolist()
    if mark.low is not None and mark.high is not None and mark.kind == "band":
        ok = np.isfinite(mark.low) & np.isfinite(mark.high)
        x, low, high = mark.x[ok].tolist(), mark.low[ok].tolist(), mark.high[ok].tolist()
        shade = f"rgba{(*(int(255 * part) for part in to_rgb(mark.colour)), 0.2)}"
        return [Scatter(x=x + x[::-1], y=low + high[::-1], fill="toself", fillcolor=shade, line_width=0,
                        mode="lines", hoverinfo="skip", **common)]  # fmt: skip
    if mark.kind == "contour":
        assert mark.z is not None
        levels = contour_levels(mark.z)
        size = levels[1] - levels[0] if len(levels) > 1 else 1.0
        return [Contour(
            x=x, y=y, z=mark.z.tolist(), colorscale="Viridis", showscale=False, line_width=1.2, name="loss",
            contours={"coloring": "lines", "showlabels": True, "start": levels[0] if levels else 0.0,
                      "end": levels[-1] if levels else 1.0, "size": size},
        )]  # fmt: skip
    if mark.kind == "line":
        line = {"color": mark.colour, "dash": "dash" if mark.dash else "solid", "width": 2}
        return [Scatter(x=x, y=y, mode="lines", line=line, **common)]
    error = None
    if mark.low is not None and mark.high is not None:
        error = {"array": (mark.high - mark.y).tolist(), "arrayminus": (mark.y - mark.low).tolist()}
    dots = {"color": mark.colour, "symbol": SHAPES[mark.marker], "size": 2 * mark.size}
    return [Scatter(x=x, y=y, mode="markers", marker=dots, text=mark.text or None, error_y=error, **common)]

"""What an exported page is told: the answers that the server would give to it."""

import base64
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs import ConfigError
from trainer.record.lines import read_events
from trainer.record.terminal import visible
from trainer.tracking.sweep import TRIALS

from ..heavy import Heavy
from ..index import colours
from ..index.config_values import Configs, differing_keys, flat_config
from ..index.rows import Run, refresh, signature
from ..index.runs_index import Entry, View
from ..pages.details import Books, details, experts, training_flops
from ..pages.logs import log
from ..pages.samples import picture
from ..pages.series import EXAMPLES, Columns, Kept, began, lines
from ..pages.stacks import stacks
from ..pages.sweep import Sweeps
from ..plan_routes import LAW, plain
from ..responses import ROW

MAIN = ("loss", "eval_loss", "grad_norm", "tokens_per_second")
"""Metrics whose curves are told of in `FINE` points."""
FINE, COARSE = 2000, 300
MOST_METRICS, MOST_COMPARED_METRICS = 300, 30
MOST_LAYERS = 64
MOST_RANKS, LONGEST_LOG = 8, 1 << 16
ON_AXES = 4000
"""Steps of which it is told where they lie on the other axes; what is between them lies between."""


def opened(folders: Sequence[Path]) -> list[Entry]:
    """Runs as the server's index has them, each folder once."""
    configs, runs = Configs(), {}
    for folder in dict.fromkeys(folders):
        sweep = visible(folder.parent.parent.name) if folder.parent.name == TRIALS else None
        id = (f"{sweep}:" if sweep else "") + visible(folder.name)
        while id in runs:  # of another root
            id += "~"
        run = runs[id] = Run(id, str(folder), sweep)
        refresh(run, signature(run.folder), configs)
    for run in colours.give(list(runs.values())):
        colours.keep(run)
    return [Entry(run.row, run.config, run.metrics, run) for run in runs.values() if run.row]


def contents_of_run(entry: Entry) -> dict[str, Any]:
    """For the page of one run; as far as its record can be read."""
    found = details(entry, Books(), Columns())
    path, own = entry.run.path, {}
    for sample in found["samples"]:
        if sample["kind"] == "picture" and "wrong" not in sample:
            with contextlib.suppress(OSError):
                sample["data"] = "data:image/png;base64," + base64.b64encode(picture(path, sample["step"])).decode()
    for layer in range(min(found["experts"]["layers"], MOST_LAYERS) if found["experts"] else 0):
        with contextlib.suppress(OSError):
            own[layer] = experts(path, layer, 200)
    ranks = found["ranks"] = found["ranks"][:MOST_RANKS]
    logs = {}
    for rank in ranks:
        with contextlib.suppress(OSError):
            logs[rank] = log(path, rank, LONGEST_LOG, "")
    curves = _curves(entry, found["metrics"][:MOST_METRICS])
    found["metrics"] = [name for name in found["metrics"] if name in curves["series"]]
    more = {}
    with contextlib.suppress(OSError):
        more["stacks"] = stacks(path)
    each = {entry.row.id: {"details": found, "experts": own, "logs": logs, "more": more} | curves}
    return {"page": "run", "run": entry.row.id, "runs": _table([entry]), "each": each}


def contents_of_comparison(entries: Sequence[Entry], metrics: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """For the page that compares runs.

    Args:
        metrics: names of each run's, by its id.
    """
    counted: dict[str, int] = {}
    for name in (name for own in metrics.values() for name in own):
        counted[name] = counted.get(name, 0) + 1
    shared = sorted(counted, key=lambda name: (name not in MAIN, -counted[name]))[:MOST_COMPARED_METRICS]
    return {
        "page": "compare",
        "compared": [entry.row.id for entry in entries],
        "runs": _table(entries),
        "keys": {"keys": [], "metrics": shared},
        "differs": differing_keys([flat_config(entry.config) for entry in entries]),
        "each": {entry.row.id: _curves(entry, shared) for entry in entries},
    }


def contents_of_sweep(folder: Path) -> dict[str, Any]:
    """For the page of a sweep, with its law at its own budget.

    Raises:
        ConfigError: its records cannot be read.
    """
    entries = opened([path.parent for path in sorted((folder / TRIALS).glob("*/config.yaml"))])
    view = View("exported", entries, place={entry.row.id: place for place, entry in enumerate(entries)})
    sweeps = Sweeps([folder.parent])
    if not (found := list(sweeps.all(view).values())):
        raise ConfigError(f"{visible(folder.name)} has no trials yet")
    status, question = sweeps.shown(found[0]), sweeps.question(found[0], None, None)
    heavy = Heavy()
    try:
        while (told := heavy.ask((), (), LAW, question)).working:
            time.sleep(0.05)
    finally:
        heavy.close()
    law = {"working": False, "computed": told.at, "law": plain(told.found)}
    listed = sweeps.listed(view)
    return {"page": "sweep", "sweep": status, "sweeps": listed, "law": law, "runs": _table(entries), "each": {}}


def _table(entries: Sequence[Entry]) -> dict[str, Any]:
    columns = {name: [getattr(entry.row, name) for entry in entries] for name in ROW}
    return {"count": len(entries), "columns": columns}


def _curves(entry: Entry, metrics: Sequence[str]) -> dict[str, Any]:
    """Points by step, and where steps lie on the other axes."""
    columns, folder, unit = Columns(), entry.run.folder, entry.row.unit
    found: dict[str, Any] = {}
    names = list(dict.fromkeys([*MAIN, *metrics]))
    axes: dict[str, list[float]] = {}
    with contextlib.suppress(OSError):
        for points, some in ((FINE, names[: len(MAIN)]), (COARSE, names[len(MAIN) :])):
            told = lines(columns, folder, some, points=points, unit=unit) if some else {}
            for name, line in told.items():
                if line.rows:
                    found[name] = {key: value for key, value in line.plain().items() if key in ("x", "y", "infinite")}
        axes = _axes(columns, folder, unit)
    return {"series": found, "axes": axes}


def _axes(columns: Columns, folder: str, unit: str) -> dict[str, list[float]]:
    names = list(dict.fromkeys([unit, *EXAMPLES]))

    def some_lines(kept: Kept) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        train = kept.columns.train
        count = len(train.row)
        rows = np.unique(np.linspace(0, count - 1, min(count, ON_AXES)).astype(int))
        times = train.time[rows] - (began(kept.columns) or 0.0)
        return train.step[rows], times, kept.columns.values(names, train.row[rows])

    steps, times, values = columns.read(folder, some_lines)
    found = {"step": steps.tolist(), "time": times.tolist()}
    counted = {name: values[name] for name in names if len(steps) and np.isfinite(values[name]).all()}
    if unit in counted:
        found["tokens"] = counted[unit].tolist()
        if flops := training_flops(read_events(folder)):
            over = next((counted[name] for name in flops.units if name in counted), None)
            if over is not None:
                found["flops"] = (over * flops.each).tolist()
    for name in EXAMPLES:
        if name in counted:
            found["examples"] = counted[name].tolist()
    return found

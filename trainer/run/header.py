"""What the user is told before a run begins: how large it is, how much data it reads, where to look."""

import shlex
from pathlib import Path

from configs import Config
from configs.units import short
from models.families import parameter_count
from models.planning.cost import has_formulas, parameters
from models.tasks.table import reads, task_of
from trainer.data.manifest import read_manifests, sources_of


def header(run_dir: Path, config: Config) -> list[str]:
    """Lines that describe a prepared run.

    Args:
        config: resolved.

    Raises:
        ConfigError: its data are missing or damaged.
    """
    found = Path("runs").resolve() == run_dir.parent  # where commands look for a name
    named = shlex.quote(config.run.name if found else str(run_dir))
    return [_model(config), *_data(config), f"in {run_dir}; `muster status {named}` shows where its time goes"]


def _model(config: Config) -> str:
    train, task = config.train, task_of(config)
    each, unit = task.counts
    shape = f"{train.global_batch} x {each}" if each > 1 else f"{train.global_batch}"
    total = train.steps * train.global_batch * (each or 1)
    told = f"{total:,} {unit if each else task.example} in {train.steps:,} steps of {shape}"
    if not has_formulas(config.model):
        count = parameter_count(config.model)
        return f"{config.model.family}: {short(count)} parameters, {told}"
    counts = parameters(config.model)
    active = f" ({short(counts.active)} active per token)" if counts.active != counts.total else ""
    return f"{short(counts.total)} parameters{active}, {told}"


def _data(config: Config) -> list[str]:
    """How often each source is read, with a remark if a small one is read more than once."""
    if reads(config) != "tokens":
        return []  # the notes of `Kind.ensure` describe them
    train, sources = config.train, sources_of(config.data)
    tokens = train.steps * train.global_batch * train.seq_len
    weights = sum(source.weight for source in sources)
    lines = []
    for source, manifest in zip(sources, read_manifests(config.data), strict=True):
        there = manifest.splits["train"].tokens
        epochs = tokens * source.weight / weights / max(there, 1)
        again = " (each token is read that often)" if epochs >= 1.5 else ""
        passes = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.2g}"
        lines.append(f"{Path(source.path).name}: {passes} epochs of {there:,} tokens{again}")
    return lines

"""Load a plain module from a run's checkpoint, for evaluation and generation; export it as a Hugging Face folder."""

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn

from configs import Config, ConfigError
from models.families import FAMILIES, build, family_of
from models.hf.folder import SHARD_BYTES, export_hf
from models.hf.names import QWEN2
from models.spectral_memory import fill_vectors
from models.tasks.learner import Learner
from models.tasks.table import reads as kind_read
from models.tasks.table import task_of
from models.tasks.task import Task
from trainer.data.manifest import TOKENIZER
from trainer.data.tokenizer.hf_tokenizer import hf_tokenizer, is_qwen2s
from trainer.data.tokenizer.kept import tokenizer_of
from trainer.data.tokenizer.tokenizer import TokenizerProcess
from trainer.data.tokenizer.tokenizer_files import FOLDER
from trainer.files.durable import replace_bytes
from trainer.files.own_files import make_empty
from trainer.run.folder import read_config
from trainer.run.plugins import with_plugins

from . import manifest, store
from .memory import on_device, restored, with_averages, wrong_memory

NOT_QWEN2S = (
    "AutoTokenizer builds Qwen2's tokenizer for this architecture, and tokenizer.json is a different one: load it with "
    "PreTrainedTokenizerFast.from_pretrained"
)


def load_module(
    run_dir: Path, step: int | None = None, reads: str | None = "tokens", *, ema: bool = False
) -> tuple[nn.Module, Config, int]:
    """A run's model in fp32 on the CPU, from the newest checkpoint that verifies, or from the one of `step`.

    Args:
        reads: kind of examples that the run's task must read; None: any.
        ema: use the moving averages in place of the weights, where there are any.

    Returns:
        (module in evaluation mode, the run's config, the checkpoint's step).

    Raises:
        ConfigError: the run's task reads other examples, or there is no such checkpoint, or it is damaged or has no
            averages.
    """
    config = read_config(run_dir)
    config = with_plugins(config)
    task = task_of(config)
    if reads not in (None, found := kind_read(config)):
        raise ConfigError(
            f"{run_dir} trains task={config.task} on {found}: generate and export need a run that trains on {reads}"
        )
    steps = manifest.committed(run_dir)
    wanted = steps[::-1] if step is None else [step]
    if not steps or (step is not None and step not in steps):
        have = f"its checkpoints are at steps {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise ConfigError(f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}: {have}")
    with torch.device("meta"):
        plain = build(config.model)
    learner = Learner(task, _networks(task, plain), listens=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    refused: list[str] = []
    for candidate in wanted:
        reader, problems = store.examine(manifest.folder(run_dir, candidate))
        if reader and (problem := reader.misfit(shapes) or wrong_memory(reader.manifest.state, learner)):
            problems = [problem]
        if reader and not problems:
            break
        refused += problems
    else:
        raise ConfigError(f"no checkpoint of {run_dir} can be used: {refused[0]}")
    if ema and not reader.averaged:
        raise ConfigError(
            f"--ema: the checkpoint of step {candidate} of {run_dir} has no EMA weights: leave it out, or train with "
            "optim.ema_decay or optim.swa_from"
        )
    module = build(config.model)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(reader.weight(name, averaged=ema))
    fill_vectors(module, config.run.seed)  # older checkpoints lack these vectors
    learner = Learner(task, _networks(task, module), listens=False)
    fresh = on_device(learner.fresh_memory(), torch.device("cpu"))
    rows = reader.manifest.state.memory
    learner.tell(restored(with_averages(rows) if ema else rows, fresh))
    return module.eval(), config, candidate


def _networks(task: Task, module: nn.Module) -> dict[str, nn.Module]:
    return {phase.parameters: module.get_submodule(phase.parameters) for phase in task.phases}


def export(
    run_dir: Path,
    to: Path,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    ema: bool = False,
) -> int:
    """Write the model and tokenizer of a run, if it has one, as a Hugging Face folder. Returns the checkpoint's step.

    Args:
        dtype, shard_bytes: as for `models.hf.folder.export_hf`.
        ema: as for `load_module`.

    Raises:
        ConfigError: as from `load_module` and `make_empty`; no Hugging Face architecture describes the model; the
            tokenizer cannot be used.
    """
    family = family_of((asked := with_plugins(read_config(run_dir))).model)
    if not family.exported:
        known = ", ".join(sorted(name for name, each in FAMILIES.items() if each.exported))
        raise ConfigError(
            f"{run_dir} has model.family={asked.model.family}, which has no Hugging Face architecture: "
            f"export needs one of {known}"
        )
    module, config, found = load_module(run_dir, step, None if family.save or family.to_hf else "tokens", ema=ema)
    texts = kind_read(config).endswith("tokens") or (run_dir / FOLDER).is_dir()
    files, special_tokens = _tokenizer(run_dir, config) if texts else ({}, None)
    largest = torch.finfo(dtype).max if dtype else math.inf
    if large := next((name for name, each in module.named_parameters() if each.abs().max() > largest), None):
        raise ConfigError(f"{large} has values over {largest:.6g}, beyond {dtype}'s range: choose another --dtype")
    make_empty(to)
    if family.save:
        family.save(module, to, special_tokens, dtype, shard_bytes)
    else:
        export_hf(module, config.model, to, special_tokens, dtype=dtype, shard_bytes=shard_bytes)
    for name, content in files.items():
        (to / name).parent.mkdir(mode=0o700, exist_ok=True)
        replace_bytes(to / name, content)
    model_type = json.loads((to / "config.json").read_text())["model_type"]
    if files and model_type == QWEN2.model_type and not is_qwen2s(files[TOKENIZER]):
        print(f"muster: {to}: {NOT_QWEN2S}", file=sys.stderr)
        replace_bytes(to / "README.md", f"{NOT_QWEN2S}.\n".encode())
    return found


def _tokenizer(run_dir: Path, config: Config) -> tuple[dict[str, bytes], dict[str, int | None]]:
    """As `hf_tokenizer`."""
    folder, info = tokenizer_of(run_dir, config.data)
    with TokenizerProcess(folder, config.data.limits) as tokenizer:
        tokenizer.trial()
        masks = bool(getattr(config.model, "added_tokens", 0))
        longest = getattr(config.model, "max_positions", config.train.seq_len)
        return hf_tokenizer(folder, info, tokenizer.token_to_id, longest, masks)

"""Short runs of the families in tests/helpers/plugins, and what is read from them."""

from pathlib import Path
from typing import Any

import torch

from configs import Config, from_dict
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader
from trainer.data.kinds import kind_of
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run, read_config
from trainer.run.plugins import with_plugins

PLUGINS = Path(__file__).parents[1] / "plugins"
MODELS: dict[str, dict[str, Any]] = {
    "small_convnet": {"classes": 3, "width": 8},
    "small_gan": {"width": 8, "generator_every": 2, "generator_ema": 0.4, "spectral_norm": True},
}
STEPS = 6


def tree(family: str, root: Path, images: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Six steps of four micro-batches."""
    found: dict[str, Any] = {
        "run": {"name": family, "root": str(root)},
        "plugins": [str(PLUGINS / f"{family}.py")],
        "model": {"family": family} | MODELS[family],
        "data": {"path": str(images), "images": {"channels": 1}},
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "precision": "fp32", "eval_sequences": 5},
        "optim": {"lr": 0.01},
        "tracking": {"enabled": False},
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    for section, keys in sections.items():
        found[section] = {**found[section], **keys} if section in found else keys
    return found


def make(family: str, root: Path, images: Path, **sections: dict[str, Any]) -> Path:
    return prepare_run(from_dict(tree(family, root, images, **sections)))


MEASURED = (
    "loss",
    "grad_norm",
    "eval_loss",
    "eval_loss_ema",
    "eval_fooled_ema",
    "accuracy",
    "eval_accuracy",
    "fooled",
    "eval_fooled",
    "loss_generator",
    "grad_norm_generator",
)


def numbers(run_dir: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every metric of a run, as last measured."""
    last = {(m["step"], key): m[key] for m in read_metrics(run_dir) for key in MEASURED if key in m}
    return [(*key, value) for key, value in sorted(last.items())]


def state(run_dir: Path, step: int = STEPS) -> dict[Any, Any]:
    """Everything that the next step depends on."""
    reader = Reader(folder(run_dir, step))
    tensors = {(k, n): reader.read(k, n).numpy().tobytes() for k in reader.states for n in reader.manifest.shapes[k]}
    found = reader.manifest.state
    return tensors | reader.manifest.scalars | found.memory | {"cursor": found.cursor, "networks": found.networks}


def drawn(run_dir: Path) -> Path:
    """The file that the evaluation at the end of a run names."""
    [event] = [event for event in read_events(run_dir) if event["event"] == "evaluation"]
    [name] = event["files"]
    return run_dir / "samples" / name


def read_with_plugins(run_dir: Path) -> Config:
    return with_plugins(read_config(run_dir))


def examples(config: Config) -> Any:
    opened = kind_of(config).open(config, "train")
    assert opened
    return opened.examples([0, 1])


def assert_same_weights(run_dir: Path, other: Path, step: int = STEPS) -> None:
    """To 1e-5 of each other."""
    mine, one = (Reader(folder(where, step)) for where in (run_dir, other))
    for name in one.manifest.shapes["weight"]:
        assert torch.allclose(mine.weight(name), one.weight(name), rtol=1e-5, atol=1e-5), name

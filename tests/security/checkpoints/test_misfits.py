"""A checkpoint that is whole and of another model or optimizer is refused; one that means the same is taken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import (
    EMBED,
    EXTRA_PARAMETER,
    GONE,
    NORM,
    SHARD,
    WEIGHT,
    Change,
    both,
    header,
    manifest,
    renamed,
    states,
    tensors,
    tree_of,
)

from configs import ConfigError
from models.tasks.language_modelling import BIAS, LOAD
from trainer.checkpoint import store
from trainer.checkpoint.export import load_module
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader


def reshaped(name: str, shape: list[int]) -> Change:
    """The weight and its moments all have another shape, and as many elements in the shard."""

    def change(path: Path) -> None:
        size = int(torch.tensor(shape).prod())
        tensors(lambda held: [held.__setitem__(k, torch.ones(size)) for k in held if k.endswith(f"/{name}@0")])(path)
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            manifest("shapes", state, name, to=shape)(path)

    return change


MISFITS: dict[str, tuple[Change, str]] = {
    "another shape": (reshaped(EMBED, [1, 32]), "has shape .1, 32., the model's is .257, 32."),
    "transposed": (reshaped(EMBED, [32, 257]), "has shape .32, 257., the model's is .257, 32."),
    "another name": (
        both(
            *(renamed(f"{s}/{NORM}@0", f"{s}/other@0") for s in ("weight", "exp_avg", "exp_avg_sq")),
            *(
                manifest("shapes", s, to=lambda shapes: {("other" if n == NORM else n): v for n, v in shapes.items()})
                for s in ("weight", "exp_avg", "exp_avg_sq")
            ),
        ),
        f"has no weight of {NORM}",
    ),
    "a parameter more": (EXTRA_PARAMETER, "has 1 parameter that the model lacks, such as more"),
    "a layer of routers more": (manifest("state", "memory", BIAS, to=[[0.0] * 2] * 2), f"{BIAS} does not have"),
    "an expert more": (manifest("state", "memory", LOAD, to=[[0.5] * 3]), f"{LOAD} does not have"),
    "an expert more in one row": (
        manifest("state", "starved", to=[[0, 0, 0]]),
        "starved does not have the model's shape",
    ),
    "another memory": (manifest("state", "memory", "more", to=[[0.0] * 2]), "state.memory has more"),
}
"""What is whole, and not the model's."""
OPTIMIZERS: dict[str, tuple[Change, str]] = {
    "no second moments": (
        both(
            manifest("shapes", "exp_avg_sq", to=GONE),
            tensors(lambda held: [held.pop(key) for key in list(held) if key.startswith("exp_avg_sq/")]),
        ),
        "but the optimizer needs exp_avg, exp_avg_sq, step",
    ),
    "no step": (manifest("scalars", "step", to=GONE), "but the optimizer needs exp_avg, exp_avg_sq, step"),
}
"""What is whole, and not the optimizer's; who wants the weights alone takes it."""
HARMLESS: dict[str, Change] = {
    "the first format": manifest("format", to=1),
    "spaces": lambda path: (path / "manifest.json").write_text(json.dumps(tree_of(path), indent=3) + "\n\n"),
    "metadata": header(lambda head: {"__metadata__": {"format": "pt"}} | head),
    "header in another order": header(lambda head: dict(reversed(head.items()))),
    "in two slices": tensors(
        lambda held: held.update({
            f"{WEIGHT}[0:257,0:16]": held[WEIGHT].view(257, 32)[:, :16].reshape(-1),
            f"{WEIGHT}[0:257,16:32]": held.pop(WEIGHT).view(257, 32)[:, 16:].reshape(-1),
        })
    ),
    "a hard link": lambda path: os.link(path / SHARD, path / "other"),
    "no memory": manifest("state", "memory", to=GONE),
    "routers under their old key": both(
        manifest("state", "routers", to={"bias": [[0.0, 0.0]], "load": [[0.0, 0.0]]}),
        manifest("state", "memory", to=GONE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_is_another_models_is_refused_too(run_dir, resumed, name):
    change, problem = MISFITS[name]
    path = folder(run_dir, 2)
    change(path)
    assert store.verify(path) == []
    with pytest.raises(ConfigError, match=problem):
        load_module(run_dir, 2)
    assert load_module(run_dir)[2] == 1
    assert resumed(run_dir) == 1
    assert not path.exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_another_optimizers_is_refused_by_a_run_only(run_dir, resumed, name):
    change, problem = OPTIMIZERS[name]
    path = folder(run_dir, 2)
    change(path)
    assert load_module(run_dir)[2] == 2
    assert resumed(run_dir) == 1
    shutil.rmtree(run_dir / "checkpoints" / "step-00000001")
    (run_dir / "checkpoints" / "step-00000002.refused").rename(path)
    with pytest.raises(ConfigError, match=rf"does not fit the model: .*{problem}"):
        resumed(run_dir)
    assert path.exists()  # whole: the model may come back


@pytest.mark.parametrize("name", HARMLESS)
def test_what_means_the_same_is_read_as_the_same(original, run_dir, resumed, name):
    path = folder(run_dir, 2)
    HARMLESS[name](path)
    assert store.verify(path) == []
    first, second = states(Reader(folder(original, 2))), states(Reader(path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed(run_dir) == 2

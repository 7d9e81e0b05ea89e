"""train.init_from: weights, and only weights, of a run, a checkpoint or a Hugging Face folder."""

import pytest
import torch
from support import resolved, tiny, train_in_process

from configs import ConfigError
from models.families import build
from trainer import checkpoint
from trainer.export import export, load_module
from trainer.record import read_metrics
from trainer.run import prepare_run
from trainer.warm_start import load_weights


def settings(root, data, name, **train):
    return tiny(
        run={"name": name, "root": str(root)},
        data={"path": str(data)},
        train={"steps": 2, "eval_sequences": 4} | train,
        optim={"lr": 1e-9, "weight_decay": 0.0},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    root = tmp_path_factory.mktemp("warm")
    run_dir = prepare_run(settings(root, tiny_data, "first", steps=3))
    assert train_in_process(run_dir) == 0
    export(run_dir, root / "hf")
    return run_dir


def test_all_three_kinds_give_the_same_weights(trained):
    module, config, step = load_module(trained)
    assert step == 3
    for source in (trained, checkpoint.folder(trained, 3), trained.parent / "hf"):
        other = build(config.model)
        load_weights(other, str(source))
        for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_run_begins_with_them_and_resumes_without(trained, tiny_data):
    run_dir = prepare_run(settings(trained.parent, tiny_data, "second", init_from=str(trained.parent / "hf")))
    assert train_in_process(run_dir) == 0
    [first] = [m["eval_loss"] for m in read_metrics(trained) if "eval_loss" in m]
    [second] = [m["eval_loss"] for m in read_metrics(run_dir) if "eval_loss" in m]
    assert second == pytest.approx(first, rel=1e-5)
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2]


def test_mistakes_name_the_key(trained, tiny_data):
    with pytest.raises(ConfigError, match=r"train\.init_from=.*no such folder"):
        prepare_run(settings(trained.parent, tiny_data, "third", init_from="nowhere"))
    with pytest.raises(ConfigError, match="neither a run with checkpoints"):
        load_weights(torch.nn.Linear(1, 1), str(trained.parent))
    wider = build(resolved(model={"hidden_size": 64}).model)
    with pytest.raises(ConfigError, match=r"is \[320, 32\], the model's is \[320, 64\]"):
        load_weights(wider, str(trained))

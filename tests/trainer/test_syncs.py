"""In a training step the host never waits for the device, but to read what the step before has measured."""

import json

import pytest
import torch
from support import tiny, train_in_process
from syncs import watch_syncs

from trainer.run.folder import prepare_run

MODELS = {
    "dense": {"num_experts": 0},
    "softmax": {"aux_loss_over": "global_batch", "router_jitter": 0.1, "dropout": 0.1},
    "sigmoid": {"router": "sigmoid", "router_bias_rate": 0.01, "expert_groups": 2, "top_groups": 1},
    "hash": {"router": "hash", "shared_expert_size": 32},
    "capacity": {"capacity_factor": 1.0, "aux_loss_over": "sequence"},
    "padded": {"capacity_factor": 1.0, "pad_to_capacity": True},
}
OPTIMIZERS = {"sgd": {"name": "sgd", "momentum": 0.9}, "lion": {"name": "lion"}, "muon": {"name": "muon"}}


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("model", "optim"),
    [*((model, {}) for model in MODELS.values()), *((MODELS["sigmoid"], optim) for optim in OPTIMIZERS.values())],
    ids=[*MODELS, *OPTIMIZERS],
)
def test_a_step_waits_for_nothing_but_the_one_before(tmp_path, tiny_data, model, optim):
    run_dir = prepare_run(
        tiny(
            run={"name": "run", "root": str(tmp_path)},
            data={"path": str(tiny_data)},
            model=model,
            optim=optim,
            # On a GPU torch's grouped products of fp32 wait for the device.
            train={"steps": 8, "micro_batch": 2, "precision": "bf16" if torch.cuda.is_available() else "fp32"},
            checkpoint={"every": 0},
        )
    )
    assert train_in_process(run_dir, watch_syncs, 4, 7, tmp_path / "syncs") == 0
    assert json.loads((tmp_path / "syncs").read_text()) == {"trainer/late.py tolist: tolist": 3}

"""fp16's dynamic loss scale: DeepSpeed's own scaler, as our engine config sets it, saved with a run and restored.

DeepSpeed refuses fp16 on a CPU, so the scaler is tested without an engine.
"""

import json

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, DynamicLossScaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from engines import EngineRun
from support import resolved

from trainer.engine.private import loss_scale_state, restore_loss_scale
from trainer.engine.settings import engine_config
from trainer.engine.start import start_processes
from trainer.state import TrainState


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)  # it asks for its rank before it logs


def new_scaler():
    """The scaler of an fp16 engine."""
    settings = DeepSpeedFP16Config(**engine_config(resolved(train={"precision": "fp16"}))["fp16"])
    scaler = CreateLossScaler(
        dtype=torch.half,
        static_loss_scale=0,
        dynamic_scaling=True,
        dynamic_loss_args=settings.dynamic_loss_scale_args(),
    )
    assert isinstance(scaler, DynamicLossScaler)
    return scaler


def scales(scaler, overflows):
    found = []
    for overflow in overflows:
        scaler.update_scale(overflow)
        found.append(scaler.loss_scale)
    return found


def saved(scaler):
    """The state as a checkpoint stores it: through TrainState and JSON."""
    text = json.dumps(TrainState(step=3, loss_scale=loss_scale_state(scaler)).to_dict())
    return TrainState(**json.loads(text)).loss_scale


def test_halves_at_the_second_overflow_and_doubles_after_the_window():
    start = 2.0**16
    assert scales(new_scaler(), [True, True, True]) == [start, start / 2, start / 4]
    # It grows at the first step that has 1000 good ones between itself and the overflow.
    quiet = scales(new_scaler(), [True, True] + [False] * 1001)
    assert quiet[-2:] == [start / 2, start]


@pytest.mark.parametrize("at", [1, 2, 3, 700, 1500])
def test_a_restored_scaler_continues_as_if_never_stopped(at):
    """Stopped after `at` steps: with its hysteresis half used, just halved, within a window, after it grew."""
    steps = [i in (0, 1, 5, 900, 901, 902) for i in range(2500)]
    whole = scales(new_scaler(), steps)
    assert len(set(whole)) > 3
    before, after = new_scaler(), new_scaler()
    first = scales(before, steps[:at])
    restore_loss_scale(after, saved(before))
    assert first + scales(after, steps[at:]) == whole


def test_state_is_plain_numbers_and_complete():
    state = saved(new_scaler())
    assert state["cur_scale"] == 2.0**16
    assert {"cur_iter", "last_overflow_iter", "cur_hysteresis", "scale_window", "min_scale"} <= state.keys()


@pytest.mark.few(1)
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1)])
def test_other_precisions_have_none(precision, stage):
    engine = EngineRun(resolved(train={"precision": precision}, parallel={"zero_stage": stage})).engine
    assert engine.loss_scale() is None
    engine.restore_loss_scale({"cur_scale": 2.0})
    assert engine.loss_scale() is None

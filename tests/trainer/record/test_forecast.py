"""A run's prediction and measurement, as they go to its record."""

import ctypes
import gc
import json

import torch
from support import resolved

from trainer.engine.start import start_processes
from trainer.health.rates import measure
from trainer.record.forecast import Forecast


def give_back_what_is_free():
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def test_predicted_beside_measured():
    start_processes(60)
    here = torch.device("cpu")
    give_back_what_is_free()  # what tests before this one left: given back in between, it would hide what is held
    forecast = Forecast(resolved(), here, lambda: [measure(here, "fp32")])
    assert forecast.measured()["peak_memory"] is None
    held = torch.ones(1 << 27)  # 537 MB, so that what the system takes back of others does not matter
    for seconds in (9.0, 9.0, 0.5, 0.25, 0.75):
        forecast.step_took(seconds)
    told = json.loads(json.dumps({"plan": forecast.predicted(), "measured": forecast.measured()}))
    assert told["measured"]["step_time"] == 0.5
    assert told["measured"]["predicted_peak_memory"] == told["plan"]["memory"]["peak"] > 0
    assert told["measured"]["predicted_step_time"] == told["plan"]["step_time"] > 0
    assert told["measured"]["peak_memory"] >= 0.8 * held.nbytes

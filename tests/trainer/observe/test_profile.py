"""`train.profile`: a trace and a memory table of the steps asked for, named in the record, and no change to the run."""

import gzip
import json

import pytest
import torch
from support import tiny, train_in_process

from configs import ConfigError, resolve
from configs.sections.train import ProfileConfig
from trainer.observe.tracing import Profiler
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run


def make(root, data, name, **profile):
    return prepare_run(
        tiny(
            run={"name": name, "root": str(root)},
            data={"path": str(data)},
            train={"steps": 4, "profile": profile},
            checkpoint={"every": 0},
        )
    )


@pytest.mark.slow
def test_trace_and_memory_table_of_the_steps(tmp_path, tiny_data):
    profiled = make(tmp_path, tiny_data, "profiled", start=2, steps=2)
    assert train_in_process(profiled) == 0
    events = [event for event in read_events(profiled) if event["event"] == "profile"]
    assert [(event["step"], event["files"]) for event in events] == [
        (3, ["profiles/steps-2-3.trace.json.gz", "profiles/steps-2-3.memory.txt"])
    ]
    assert sorted(path.name for path in (profiled / "profiles").iterdir()) == [
        "steps-2-3.memory.txt",
        "steps-2-3.trace.json.gz",
    ]
    trace = json.loads(gzip.decompress((profiled / events[0]["files"][0]).read_bytes()))
    names = [entry.get("name") for entry in trace["traceEvents"]]
    # Of steps 2 and 3 alone: a forward pass each, and an optimizer step over two groups of parameters.
    assert names.count("aten::embedding") == 2
    assert names.count("aten::_fused_adamw_") == 4
    assert "CPU Mem" in (profiled / events[0]["files"][1]).read_text()

    plain = make(tmp_path, tiny_data, "plain")
    assert train_in_process(plain) == 0
    assert not (plain / "profiles").exists()
    losses = [[(m["step"], m.get("loss")) for m in read_metrics(run)] for run in (profiled, plain)]
    assert losses[0] == losses[1]


def test_only_the_first_process_profiles(tmp_path):
    profiler = Profiler(tmp_path, ProfileConfig(start=1, steps=1), enabled=False)
    profiler.before(1)
    profiler.after(1, None)
    assert list(tmp_path.iterdir()) == []


def test_a_rollback_into_the_range_does_not_start_a_second_one(tmp_path):
    """Steps 1 and 2, back to step 1, and on to step 3: one trace over all of it."""
    profiler = Profiler(tmp_path, ProfileConfig(start=1, steps=3), enabled=True)
    for step in (1, 2, 1, 2, 3):
        profiler.before(step)
        torch.ones(2).sum()
        if step != 2:  # a step that ends in a rollback is not reported as ended
            profiler.after(step, None)
    assert [path.name for path in sorted((tmp_path / "profiles").iterdir())] == [
        "steps-1-3.memory.txt",
        "steps-1-3.trace.json.gz",
    ]


def test_a_range_after_the_end_is_refused():
    resolve(tiny(train={"profile": {"start": 4, "steps": 3}}))
    with pytest.raises(ConfigError, match=r"train\.profile covers steps 5 to 7, but the run ends at step 6"):
        resolve(tiny(train={"profile": {"start": 5, "steps": 3}}))
    with pytest.raises(ConfigError, match=r"train\.profile\.start=0: should be greater than 0"):
        tiny(train={"profile": {"start": 0}})

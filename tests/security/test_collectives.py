"""What the processes of a run tell each other is JSON in tensors: no process ever unpickles what another sent."""

import json
import math

import pytest
import strangers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from teams import in_team

from configs import resolve
from trainer.processes.collectives import LARGEST, _decoded, _encoded
from trainer.record.lines import read_events, read_metrics
from trainer.run.folder import prepare_run

VALUES = [
    None, True, 0, -1, 2**63, 10**40, 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, "",
    "ä\n\x00", "\ud800", [], {}, [[1, 2.5, None], {"a": {"b": ["c"]}}], "x" * 100_000,
]  # fmt: skip


def same(value: object, other: object) -> bool:
    return repr(value) == repr(other)  # NaN too, and -0.0 apart from 0.0


def test_values_arrive_as_they_were():
    for rank, (alone, together) in enumerate(in_team(3, strangers.sent_around, VALUES)):
        assert same(alone, VALUES), rank
        assert same(together, [[[sender, value] for sender in range(3)] for value in VALUES]), rank


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(PLAIN)
def test_every_plain_value_survives(value):
    assert same(_decoded(_encoded(value), 0), value)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(sent):
    import torch

    try:
        found = _decoded(torch.tensor(list(sent), dtype=torch.uint8), 1)
    except RuntimeError as error:
        assert str(error).startswith("rank 1 sent something that is not JSON")  # noqa: PT017
    else:
        assert same(json.loads(sent), found)


def test_what_is_too_deep_is_refused():
    import torch

    with pytest.raises(RuntimeError, match="rank 2 sent something that is not JSON"):
        _decoded(torch.full((10**6,), ord("["), dtype=torch.uint8), 2)


def test_bytes_of_any_length_go_to_the_first():
    for sizes in ([3, 0, 5], [0, 0, 0]):
        expected = [[rank + 1] * size for rank, size in enumerate(sizes)]
        assert in_team(3, strangers.bytes_to_chief, sizes) == [expected, None, None]


@pytest.mark.parametrize("how", ["chief", "all"])
@pytest.mark.parametrize("what", ["pickle", "long", "negative"])
def test_nonsense_is_refused(how, what):
    [_, said] = in_team(2, strangers.told_nonsense, f"{how} {what}")
    expected = {
        "pickle": "rank 0 sent something that is not JSON",
        "long": f"rank 0 is about to send {1 << 40:,} bytes; at most {LARGEST:,} are accepted",
        "negative": "rank 0 is about to send -5 bytes",
    }
    assert said.startswith(expected[what])


def test_object_collectives_of_any_library_raise(tmp_path):
    """Before anything of a pickle runs, in DeepSpeed, torch or a plugin."""
    first, second = in_team(2, strangers.by_object_collectives, tmp_path / "mark")
    refused = "object collectives are disabled in a run"
    assert [said.startswith(refused) for said in first] == [False, True, True, True]  # its own is not read
    assert [said.startswith(refused) for said in second] == [True, True, False, True, True]
    assert not (tmp_path / "mark").exists()


RUNS = [
    {"tp": 2, "ep": 2, "zero_stage": 1},
    *(
        pytest.param(topology, marks=pytest.mark.slow)
        for topology in [
            {"pp": 2},
            {"dp": 2, "zero_stage": 0},
            {"dp": 2, "ep": 2, "zero_stage": 2},
            {"dp": 2, "zero_stage": 3},
            {"dp": 2, "zero_stage": 3, "offload": "parameters"},
            {"dp": 4, "zero_stage": 3, "hpz": 2},
            {"sp": 2, "zero_stage": 2},
            {"dp": 2, "pp": 2, "ep": 2},
            {"pp": 2, "pp_schedule": "dualpipev"},
        ]
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("topology", RUNS, ids=lambda t: "-".join(f"{key}{value}" for key, value in t.items()))
def test_a_run_unpickles_nothing(tmp_path, tiny_data, topology):
    """With every reader of pickles raising: preflight, steps, evaluation, samples, checkpoints, a resume."""
    dense = "hpz" in topology or topology.get("offload")
    layers, batch = (4, 8) if "pp_schedule" in topology else (2, 4)
    asked = tiny(
        run={"name": "run", "root": str(tmp_path)},
        data={"path": str(tiny_data)},
        model={"num_layers": layers, "num_kv_heads": 4} | ({"num_experts": 0} if dense else {}),
        train={"steps": 2, "global_batch": batch, "micro_batch": 1, "eval_every": 2, "sample_tokens": 2},
        checkpoint={"every": 2},
        cluster={"timeout": 60},
        parallel=topology,
    )
    run_dir, world = prepare_run(asked), resolve(asked)[0].parallel.world_size
    assert in_team(world, strangers.train_without_pickles, run_dir) == ["FINISHED"] * world
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2\n", "steps: 3\n"))
    assert in_team(world, strangers.train_without_pickles, run_dir) == ["FINISHED"] * world
    events = {event["event"] for event in read_events(run_dir)}
    assert {"preflight", "checkpoint", "resumed"} <= events
    assert [m["step"] for m in read_metrics(run_dir) if "loss" in m] == [1, 2, 3]
    assert [m["step"] for m in read_metrics(run_dir) if "eval_loss" in m] == [2, 3]
    assert bool(list(run_dir.glob("samples/experts-*.json"))) == (not dense)

"""Before the first step, in real processes: good machines train; every rank names a bad one, with the reason."""

import os
import pickle
import re

import bad_machines as bad
import pytest
import torch
from ranks import run_ranks
from support import resolved, tiny
from teams import in_team

from configs import to_yaml
from trainer.health.links import clock_offset, rounds
from trainer.health.preflight import MARK, BadMachine
from trainer.health.rates import EXACT, TILE, factors
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run


def the_event(folder):
    [event] = [event for event in read_events(folder) if event["event"] == "preflight"]
    return event


@pytest.mark.parametrize("world", [1, 2, 4])
def test_good_machines(tmp_path, world):
    assert in_team(world, bad.checked, [tmp_path] * world, resolved()) == [world] * world
    event = the_event(tmp_path)
    assert event["broken"] == []
    assert [machine["host"] for machine in event["machines"]] == [f"node-{rank}" for rank in range(world)]
    assert [machine["ranks"] for machine in event["machines"]] == [[rank] for rank in range(world)]
    for machine in event["machines"]:
        assert machine["flops"] > 0
        assert machine["write"] > 0
        assert (machine["link"] is None) == (world == 1)
        assert abs(machine["clock"][0]) <= machine["clock"][1]
        assert machine["versions"]["torch"] == torch.__version__
    assert not list(tmp_path.glob(f"{MARK}*"))


def test_no_generator_moves(tmp_path):
    assert in_team(2, bad.random_states, tmp_path, resolved()) == [True, True]


FAULTS = {
    "product": (bad.wrong_product, r"node-2 \(rank 2\): a matrix product gave a wrong result"),
    "sums": (bad.wrong_sums, r"node-2 \(rank 2\): an all-reduce or all-gather gave a wrong result"),
    "link": (bad.garbled_link, r"node-2 \(rank 2\): wrong numbers arrived over its link"),
    "versions": (bad.other_torch, r"node-2 \(rank 2\): it has torch 2\.0\.0, others have"),
}


@pytest.mark.few(1)
@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_every_rank_names_the_bad_one(tmp_path, fault, reason):
    told = in_team(3, bad.checked, [tmp_path] * 3, resolved(), fault, (2,))
    assert told[0] == told[1] == told[2]
    text, hosts, ranks = told[0]
    assert re.match(reason, text)
    assert (hosts, ranks) == (["node-2"], [2])
    assert the_event(tmp_path)["broken"] == text.split("; ")


def test_a_folder_that_is_not_shared_is_not_the_runs(tmp_path):
    for name in ("shared", "other"):
        (tmp_path / name).mkdir()
    folders = [tmp_path / "shared", tmp_path / "other", tmp_path / "shared"]
    told = in_team(3, bad.checked, folders, resolved())
    reason = "node-1 (rank 1): the run's folder is not the same one as on rank 0"
    assert told == [(reason, ["node-1"], [1])] * 3


def test_a_folder_that_one_process_cannot_write_to(tmp_path):
    [text, hosts, _] = in_team(3, bad.checked, [tmp_path] * 3, resolved(), bad.cannot_write, (1,))[0]
    assert text == "node-1 (rank 1): the run's folder cannot be written: Read-only file system"
    assert hosts == ["node-1"]


def test_a_clock_and_a_slow_link_are_named_and_training_goes_on(tmp_path):
    assert in_team(4, bad.checked, [tmp_path] * 4, resolved(), bad.clock_ahead, (1,), 90.0) == [4] * 4
    assert any(
        re.match(r"node-1 \(rank 1\): its clock is \d\d\.\d s ahead", line) for line in the_event(tmp_path)["slow"]
    )


def test_the_end_of_a_slow_link(tmp_path):
    assert in_team(4, bad.checked, [tmp_path] * 4, resolved(), bad.slow_link, (2,), 0.1) == [4] * 4
    assert any(re.match(r"node-2 \(rank 2\): .* to the fastest peer", line) for line in the_event(tmp_path)["slow"])


def test_a_run_ends_before_its_model_is_built(tmp_path, tiny_data):
    config = tiny(
        run={"name": "run", "root": str(tmp_path)},
        data={"path": str(tiny_data)},
        parallel={"dp": 2},
        train={"steps": 2},
    )
    run_dir = prepare_run(config)
    assert in_team(2, bad.trained, run_dir, bad.wrong_product, (1,)) == [["node-1"]] * 2
    names = [event["event"] for event in read_events(run_dir)]
    assert names == ["resolved", "attempt_started", "preflight", "failure", "attempt_ended"]
    assert in_team(2, bad.trained, run_dir) == ["FINISHED"] * 2


def test_torchrun_says_it_once_with_exit_code_1(tmp_path, tiny_data):
    config = tiny(run={"name": "run", "root": "runs"}, data={"path": str(tiny_data)}, parallel={"dp": 2})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    ended = run_ranks(tmp_path, ["c.yaml"], before=bad.own_machine, given=(bad.wrong_product, (1,)))
    assert ended == [(1, "muster: node-1 (rank 1): a matrix product gave a wrong result\n"), (1, "")]


def test_a_folder_that_does_not_exist(tmp_path, tiny_data):
    config = tiny(run={"name": "run", "root": "runs"}, data={"path": str(tiny_data)}, parallel={"dp": 2})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    ended = run_ranks(tmp_path, ["c.yaml"], before=bad.own_machine, given=(bad.blind, (1,)))
    where = tmp_path / "runs" / "run"
    reason = f"muster: {where} does not exist on node-1: run.root must be a folder that every machine can reach\n"
    assert ended == [(1, reason), (1, "")]


def test_bad_machine_goes_through_a_pickle():
    error = pickle.loads(pickle.dumps(BadMachine("why", ["a"], [1, 2])))
    assert (str(error), error.hosts, error.ranks) == ("why", ["a"], [1, 2])


@pytest.mark.parametrize("side", [TILE, 8 * TILE])
def test_sums_stay_exact_in_any_order_and_precision(side):
    a, b = factors(side)
    repeat = side // TILE
    for sign in (1, -1):  # whatever is added up first, no more than all of one sign can come together
        most = ((a * sign).clamp(min=0) @ b.clamp(min=0) + (a * -sign).clamp(min=0) @ (-b).clamp(min=0)).max()
        assert 0 < most * repeat <= EXACT


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_every_rank_has_one_partner_at_a_time(count):
    found = rounds(range(count), most=count)
    met = [tuple(sorted(pair)) for pairs in found for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    for pairs in found:
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) == count - count % 2
    assert len(rounds(range(100))) == 4
    assert rounds(["a"]) == []


def test_ranks_of_a_machine_meet_those_of_others_only():
    assert rounds(["a", "a", "b", "b"]) == [[(0, 2), (1, 3)]]
    assert rounds(["a", "b", "b"]) == [[(0, 1)]]


def test_numbers_arrive_over_machines_of_several_ranks():
    assert in_team(4, bad.timetable, ["a", "a", "b", "c"]) == [[]] * 4


def test_an_offset_and_its_bound():
    # Clocks 10 s apart; everyone leaves 0.5 s after the last has come.
    mine, chief = [(110.0, 111.5), (120.0, 120.1)], [(101.0, 101.5), (109.9, 110.1)]
    ahead, error = clock_offset(mine, chief)
    assert ahead == pytest.approx(10.05)
    assert error == pytest.approx(0.15)
    assert abs(ahead - 10) <= error


def test_files_of_a_killed_preflight_are_removed(tmp_path):
    (tmp_path / f"{MARK}left").touch()
    assert in_team(1, bad.checked, [tmp_path], resolved()) == [1]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(MARK)]

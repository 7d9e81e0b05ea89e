"""The ranks that others wait for, by flight recorder dumps: as NCCL makes them, and real ones of two processes."""

import json
from typing import Any

import pytest
from faults import stand_apart, transfers

from trainer.health.flight import Dump, Waiting, shortened, waited_for
from trainer.health.watchdog import read_calls

WORLD, LEFT, RIGHT = ("0", "default_pg"), ("5", "tp"), ("6", "tp")
RANKS = {"0": [0, 1, 2, 3], "5": [0, 1], "6": [2, 3]}


def entry(group: tuple[str, str], number: int, state: str = "completed", call: str = "all_reduce", **changes) -> Dump:
    """One call, as torch 2.13 writes it."""
    found: dict[str, Any] = {
        "collective_seq_id": number, "p2p_seq_id": 0, "is_p2p": False, "op_id": number, "pg_id": int(group[0]),
        "process_group": list(group), "profiling_name": f"nccl:{call}", "state": state, "retired": state == "completed",
        "input_dtypes": ["Float"], "input_sizes": [[7]], "output_dtypes": ["Float"], "output_sizes": [[7]],
        "thread_id": "139765794507648", "thread_name": "python", "time_created_ns": 1795709923730550483,
        "time_discovered_started_ns": 0, "time_discovered_completed_ns": 0, "timeout_ms": 1800000,
    }  # fmt: skip
    return found | changes


def transfer(call: str, number: int, state: str = "scheduled") -> Dump:
    return entry(WORLD, 0, state, call, is_p2p=True, p2p_seq_id=number)


def recorded(*entries: Dump, forgotten: int = 0, status: dict[str, Any] | None = None) -> Dump:
    numbered = [e | {"record_id": forgotten + i} for i, e in enumerate(entries)]
    config = {name: {"name": name, "desc": "", "ranks": json.dumps(ranks)} for name, ranks in RANKS.items()}
    return shortened({"version": "2.10", "entries": numbered, "pg_config": config, "pg_status": status or {}})


DONE = entry(WORLD, 1)
WAITS = recorded(DONE, entry(WORLD, 2, "scheduled"))


@pytest.mark.parametrize(
    ("dumps", "suspects", "where"),
    [
        ([WAITS, WAITS, recorded(DONE), WAITS], [2], "all_reduce 2 of group 0 (default_pg)"),
        ([WAITS, WAITS, WAITS, WAITS], [], ""),
        ([WAITS, WAITS, None, WAITS], [], ""),
        # Ranks 0 and 1 wait for all, rank 3 only for rank 2, which has not called what its half is in.
        (
            [WAITS, WAITS, recorded(DONE), recorded(DONE, entry(RIGHT, 1, "scheduled", "all_gather"))],
            [2],
            "all_reduce 2 of group 0 (default_pg)",
        ),
        # Rank 1 ran ahead on its host; rank 0 has not called what came before.
        (
            [recorded(DONE), recorded(DONE, entry(LEFT, 1, "scheduled"), entry(WORLD, 2, "scheduled")), WAITS, WAITS],
            [0],
            "all_reduce 2 of group 0 (default_pg)",
        ),
        (
            [*[recorded(DONE, entry(WORLD, 2, "started"))] * 3, WAITS],
            [3],
            "all_reduce 2 of group 0 (default_pg)",
        ),
        ([WAITS, recorded(entry(LEFT, 1)), WAITS, WAITS], [1], "all_reduce 2 of group 0 (default_pg)"),
    ],
    ids=["not called", "all called", "unknown", "a chain", "ahead", "not begun", "never in the group"],
)
def test_the_ranks_that_are_waited_for(dumps, suspects, where):
    found = waited_for(dict(enumerate(dumps)))
    assert found == (suspects, where)


def test_calls_that_the_recorder_dropped_are_still_counted():
    """The group's status goes on counting; a group without any entry left may have been entered."""

    def status(enqueued: int) -> dict[str, Any]:
        return {"0": {"last_enqueued_collective": str(enqueued), "last_completed_collective": "899"}}

    ahead = recorded(entry(WORLD, 990, "scheduled"), forgotten=5000, status=status(990))
    behind = recorded(entry(WORLD, 899), forgotten=5000, status=status(899))
    forgot = recorded(entry(LEFT, 1), forgotten=5000)
    found = waited_for({0: ahead, 1: behind, 2: ahead, 3: forgot})
    assert found == ([1], "collective 900 of group 0 (default_pg)")


def test_sends_and_receives_of_a_pipeline():
    """Stages wait for those before them; the first, which did not send, waits for nobody."""
    stages = [recorded(transfer("send 0->1", 1, "completed")), recorded(transfer("recv 1<-0", 2)),
              recorded(transfer("recv 2<-1", 1)), recorded(transfer("recv 3<-2", 1))]  # fmt: skip
    assert waited_for(dict(enumerate(stages))) == ([0], "recv 1<-0 of group 0")
    both = {0: recorded(transfer("send 0->1", 9)), 1: recorded(transfer("recv 1<-0", 2))}
    assert waited_for(both) == ([], "")


def test_parts_of_a_coalesced_call_end_with_it():
    parts = [transfer("send 0->1", 4), transfer("recv 0<-1", 4), transfer("coalesced", 4, "completed")]
    assert [e["profiling_name"] for e in recorded(*parts)["entries"]] == ["nccl:coalesced"]


def test_a_dump_is_short():
    calls = [entry(WORLD, n) for n in range(1, 500)] + [entry(WORLD, n, "scheduled") for n in range(500, 900)]
    numbers = [e["collective_seq_id"] for e in recorded(*calls)["entries"]]
    assert numbers == [*range(499, 520), 899]


@pytest.mark.parametrize(
    "spoiled",
    ["", "[]", '"text"', '{"entries": [{}]}', '{"entries": [null]}', '{"entries": 3, "whole": true}', '{"error": "x"}'],
)
def test_a_hang_ends_where_a_recorder_is_not_understood(tmp_path, spoiled):
    """From another version of torch, or lost to a full disk: what the other ranks' dumps show is still reported."""
    paths = {rank: tmp_path / f"{rank}.json" for rank in range(4)}
    for rank, dump in enumerate([WAITS, WAITS, recorded(DONE)]):
        paths[rank].write_text(json.dumps(dump))
    assert read_calls(paths) == Waiting([2], "all_reduce 2 of group 0 (default_pg)")
    paths[3].write_text(spoiled)
    assert read_calls(paths) in (Waiting([], ""), Waiting([2], "all_reduce 2 of group 0 (default_pg)"))


def test_two_processes(pair, tmp_path):
    """After transfers too, which gloo counts and the recorder does not."""
    pair(transfers, 3)
    found = waited_for(dict(enumerate(pair(stand_apart, tmp_path / "dumped"))))
    assert found.suspects == [1]
    assert found.where.startswith("all_reduce ")
    assert found.where.endswith(" of group 0 (default_pg)")

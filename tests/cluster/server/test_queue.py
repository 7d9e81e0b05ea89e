"""The queue's decisions: gangs whole or not at all, by priority and age, groups inside machines."""

import json

import pytest

from cluster.gangs.share import Node, Share, share_of_gang
from cluster.server.messages import Known
from cluster.server.waiting import Gang, Waiting, fold, place, startable
from configs import ConfigError, from_dict

CPU = Share(1, 0)
GPU = Share(4, 1)
NODE = Node(32, 8)


def job(id: str, workers: int, priority: int = 0, since: float = 0.0, each: Share = CPU, group: int = 1) -> Waiting:
    return Waiting(id, Gang(workers, each, group), priority, since)


@pytest.mark.parametrize(
    ("waiting", "free", "total", "expected"),
    [
        ([job("a", 2), job("b", 2)], [Node(3, 0)], [Node(3, 0)], ["a"]),  # never half of b
        ([job("a", 2), job("b", 2)], [Node(4, 0)], [Node(4, 0)], ["a", "b"]),
        ([job("a", 2, since=2), job("b", 2, since=1)], [Node(3, 0)], [Node(3, 0)], ["b"]),  # the older
        ([job("a", 2, since=1), job("b", 2, priority=1, since=2)], [Node(3, 0)], [Node(3, 0)], ["b"]),
        ([job("big", 4), job("small", 1, since=1)], [Node(2, 0)], [Node(4, 0)], []),  # nobody overtakes
        ([job("huge", 9), job("small", 1, since=1)], [Node(2, 0)], [Node(4, 0)], ["small"]),  # it waits for machines
        ([job("a", 3)], [Node(2, 0), Node(1, 0)], [Node(2, 0), Node(2, 0)], ["a"]),
        ([job("a", 1, each=Share(2, 0))], [Node(1, 0), Node(1, 0)], [Node(2, 0)], []),  # a worker is on one machine
        ([job("a", 8, each=GPU)], [Node(32, 4), Node(32, 4)], [NODE, NODE], ["a"]),
        ([job("a", 1)], [], [], []),
        ([], [Node(4, 0)], [Node(4, 0)], []),
    ],
)
def test_who_starts(waiting, free, total, expected):
    assert startable(waiting, [], free, total) == expected


def test_what_was_started_holds_its_place_before_ray_knows():
    free = [Node(3, 0)]
    assert startable([job("b", 2)], [Gang(2, CPU)], free, free) == []
    assert startable([job("b", 1)], [Gang(2, CPU)], free, free) == ["b"]


@pytest.mark.parametrize(
    ("gang", "free", "fits"),
    [
        (Gang(8, GPU, 4), [Node(32, 4), Node(32, 4)], True),
        (Gang(8, GPU, 4), [Node(32, 6), Node(32, 6)], True),
        (Gang(8, GPU, 4), [Node(32, 5), Node(32, 3)], False),  # there is room for 8, not for two whole groups
        (Gang(8, GPU, 1), [Node(32, 5), Node(32, 3)], True),
        (Gang(16, GPU, 16), [Node(32, 8), Node(32, 8)], True),  # fits no machine: as it comes
        (Gang(8, GPU, 4), [Node(12, 8), Node(32, 4)], False),  # 3 by their CPUs
    ],
)
def test_groups_stay_inside_a_machine(gang, free, fits):
    assert (place(gang, free, [NODE, NODE]) is not None) == fits


def test_the_tightest_machine_that_fits_is_taken():
    left = place(Gang(2, CPU), [Node(8, 0), Node(2, 0), Node(4, 0)], [NODE])
    assert left == [Node(8, 0), Node(0, 0), Node(4, 0)]


def test_the_journal_says_the_last_of_each_job():
    first = {
        "id": "job-a", "name": "a", "run_dir": "/runs/a", "command": "true", "workers": 1, "most": 1, "cpus": 1.0,
        "gpus": 0, "group": 1, "priority": 0, "state": "QUEUED", "submitted": 1.0, "time": 1.0,
    }  # fmt: skip
    lines = ["noise", json.dumps(first), '{"id": "job-b", "st', '{"id": "job-a", "state": "RUNNING", "time": 2.0}']
    refused: list[str] = []
    assert fold(lines, refused.append) == {"job-a": Known(**first | {"state": "RUNNING", "time": 2.0})}
    assert refused == [lines[0], lines[2]]
    assert fold(json.dumps(found.entry()) for found in fold(lines).values()) == fold(lines)
    older = {key: value for key, value in first.items() if key != "most"}
    assert fold([json.dumps(older)])["job-a"].most == 1


def asked(dp: int, **cluster):
    return from_dict({"parallel": {"dp": dp}, "train": {"global_batch": dp}, "cluster": cluster})


@pytest.mark.parametrize(
    ("config", "nodes", "words"),
    [
        (asked(16), [Node(32, 4), Node(32, 4)], "asks for 16 GPUs; the cluster has 8 (2 nodes x 4)"),
        (asked(16), [Node(32, 8), Node(32, 4), Node(8, 0)], "asks for 16 GPUs; the cluster has 12 (1 node x 8, 1 node"),
        (asked(4, cpus_per_worker=2), [Node(3, 0)], "asks for 8 CPUs; the cluster has 3 (1 node x 3)"),
        (asked(2, gpus_per_worker=1), [Node(3, 0)], "asks for 2 GPUs; the cluster has 0 (no node)"),
        (asked(3, cpus_per_worker=2), [Node(3, 0), Node(3, 0)], "room for 2"),
    ],
)
def test_more_than_the_cluster_has_is_said_at_once(config, nodes, words):
    with pytest.raises(ConfigError, match="--queue") as error:
        share_of_gang(config, nodes, wait=False)
    assert words in str(error.value)
    share_of_gang(config, nodes, wait=True)


@pytest.mark.parametrize(
    ("config", "nodes", "each"),
    [
        (asked(1), [Node(96, 8)], Share(12, 1)),  # not all CPUs, as `muster train` takes: others need them
        (asked(8), [Node(96, 8)], Share(12, 1)),
        (asked(1, cpus_per_worker=20), [Node(96, 8)], Share(20, 1)),
        (asked(1), [Node(4, 0)], Share(4, 0)),
        (asked(2), [Node(4, 0)], Share(2, 0)),
        (asked(1, gpus_per_worker=0), [Node(8, 8)], Share(8, 0)),
    ],
)
def test_a_worker_gets_the_cpus_that_go_with_its_gpus(config, nodes, each):
    assert share_of_gang(config, nodes, wait=False) == each

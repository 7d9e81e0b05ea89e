"""Which machine is bad, from what every process measured of itself."""

from dataclasses import replace

import pytest

from trainer.health.peers import Report, judge

VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "deepspeed": "0.19.8"}


def report(rank, host=None, **changes):
    sound = Report(
        rank=rank, host=host or f"node-{rank}", address="10.0.0.1", device="H100", identity=f"GPU-{rank}", product=5e14,
        copy=2e12, right=True, fingerprint="aa", sums_right=True, link=4e10, wrong_from=[], sees_folder=True, write=1e9,
        free_disk=10**12, disk_error="", disk_full=False, clock=(0.0, 1e-3), free_memory=80 * 10**9, versions=VERSIONS,
    )  # fmt: skip
    return replace(sound, **changes)


def machines(count, per_machine=1):
    return [report(rank, f"node-{rank // per_machine}") for rank in range(count * per_machine)]


def told(reports):
    return [(v.kind, v.what, v.host, v.ranks, v.singled_out) for v in judge(reports)]


@pytest.mark.parametrize("reports", [machines(1), machines(2), machines(1, 8), machines(16, 8)])
def test_good_machines_are_not_named(reports):
    assert judge(reports) == []


BROKEN = {
    "product": {"right": False, "fingerprint": "bb"},
    "folder": {"sees_folder": False},
    "disk": {"disk_error": "Permission denied"},
    "versions": {"versions": VERSIONS | {"torch": "2.12.0"}},
    "sums": {"sums_right": False},
}


@pytest.mark.parametrize(("what", "change"), BROKEN.items())
@pytest.mark.parametrize("count", [2, 5])
def test_the_broken_one_is_named(what, change, count):
    reports = machines(count)
    reports[1] = replace(reports[1], **change)
    assert told(reports) == [("broken", what, "node-1", [1], True)]


def test_ranks_of_a_machine_are_named_together():
    reports = machines(3, 4)
    for rank in (5, 7):
        reports[rank] = replace(reports[rank], right=False)
    assert told(reports) == [("broken", "product", "node-1", [5, 7], True)]


def test_machines_of_one_name_are_told_apart_by_their_address():
    reports = [replace(report(rank, "same"), address=f"10.0.0.{rank}") for rank in range(3)]
    for rank in (0, 2):
        reports[rank] = replace(reports[rank], disk_error="Read-only file system")
    assert [verdict[3] for verdict in told(reports)] == [[0], [2]]


def test_another_result_is_only_compared_on_equal_devices():
    reports = [report(0), report(1), report(2, fingerprint="bb")]
    assert told(reports) == [("broken", "product", "node-2", [2], True)]
    assert told([report(0), report(1), replace(reports[2], device="A100")]) == []


def test_of_two_results_the_wrong_one_is_unknown():
    reports = [report(0), report(1, fingerprint="bb")]
    assert told(reports) == [("broken", "product", f"node-{i}", [i], False) for i in (0, 1)]


def test_sums_that_arrive_wrong_everywhere_blame_nobody():
    assert [verdict[4] for verdict in told([report(i, sums_right=False) for i in range(4)])] == [False] * 4


def test_the_link_that_garbles_is_the_one_of_all_wrong_exchanges():
    reports = machines(4)
    reports[2] = replace(reports[2], wrong_from=[0, 3])
    reports[0] = replace(reports[0], wrong_from=[2])
    assert told(reports) == [("broken", "link", "node-2", [2], True)]
    two = [report(0), report(1, wrong_from=[0])]
    assert told(two) == [("broken", "link", f"node-{i}", [i], False) for i in (0, 1)]


def test_versions_without_a_majority_are_those_of_rank_0():
    other = VERSIONS | {"deepspeed": "0.19.7"}
    assert told([report(0), report(1, versions=other)]) == [("broken", "versions", "node-1", [1], True)]
    assert told([report(0, versions=other), report(1), report(2)]) == [("broken", "versions", "node-0", [0], True)]
    python = VERSIONS | {"python": "3.11.9"}
    assert told([report(0), report(1), report(2, versions=python)]) == [("slow", "versions", "node-2", [2], True)]


SLOW = {
    "product": {"product": 2e14},
    "copy": {"copy": 0.9e12},
    "link": {"link": 1e10},
    "disk": {"write": 4e8},
    "memory": {"free_memory": 30 * 10**9},
    "clock": {"clock": (-1.5, 0.1)},
    "full": {"disk_full": True, "write": None},
}


@pytest.mark.parametrize(("what", "change"), SLOW.items())
def test_the_slow_one_is_named_with_its_figure(what, change):
    reports = machines(4)
    reports[3] = replace(reports[3], **change)
    assert told(reports) == [("slow", what, "node-3", [3], True)]


def test_a_reason_has_the_figures():
    [verdict] = judge([*machines(3), report(3, product=1e14)])
    assert verdict.reason == "1e+05 GFLOP/s of matrix products, its peers' median is 5e+05"
    [verdict] = judge([report(0), report(1, clock=(75.25, 0.001))])
    assert verdict.reason == "its clock is 75.2 s ahead of rank 0's"


def test_half_is_not_yet_slow():
    reports = machines(3)
    assert told([*reports, report(3, product=2.5e14, copy=1e12, link=2e10, write=5e8)]) == []


def test_a_link_has_two_ends_so_that_it_takes_three_machines():
    assert told([report(0), report(1, link=1e9)]) == []


def test_a_slow_device_among_the_eight_of_a_machine():
    reports = machines(2, 8)
    reports[3] = replace(reports[3], product=1e14)
    assert told(reports) == [("slow", "product", "node-0", [3], True)]


def test_processes_that_share_cores_are_compared_with_other_machines():
    def cpu(rank, host, product):
        return report(rank, host, device="EPYC", identity="", product=product)

    assert told([cpu(0, "a", 1e11), cpu(1, "a", 1e10), cpu(2, "a", 1e11)]) == []
    both = [cpu(0, "a", 1e11), cpu(1, "a", 1e11), cpu(2, "b", 1e10), cpu(3, "b", 2e10)]
    assert told(both) == [("slow", "product", "b", [2, 3], True)]


def test_another_device_model_is_not_slow():
    assert told([report(0), report(1), report(2, device="A100", product=1e14, copy=1e11)]) == []


def test_a_clock_is_named_only_where_it_is_sure():
    assert told([report(0), report(1, clock=(1.5, 0.7))]) == []


def test_the_broken_come_first():
    reports = [*machines(3), report(3, product=1.0, right=False)]
    assert [verdict.kind for verdict in judge(reports)] == ["broken", "slow"]

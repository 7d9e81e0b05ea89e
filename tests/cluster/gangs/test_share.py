"""How machines are divided among workers."""

import pytest

from cluster.gangs.share import Node, Share, share, share_of_gang, share_of_most
from configs import Config, ConfigError, from_dict, resolve


def asked(dp: int, **cluster) -> Config:
    return from_dict({"parallel": {"dp": dp}, "cluster": cluster})


@pytest.mark.parametrize(
    ("dp", "nodes", "expected"),
    [
        (1, [Node(8, 0)], Share(8, 0)),
        (2, [Node(8, 0)], Share(4, 0)),
        (3, [Node(8, 0)], Share(2, 0)),
        (4, [Node(2, 0)], Share(0.5, 0)),
        (3, [Node(2, 0)], Share(0.5, 0)),  # two on one CPU, not three on two: a worker's CPUs are on one machine
        (8, [Node(96, 8)], Share(12, 1)),
        (1, [Node(96, 8)], Share(96, 1)),
        (3, [Node(8, 0), Node(4, 0)], Share(4, 0)),  # uneven machines: 2 on the one, 1 on the other
        (12, [Node(64, 8), Node(8, 4)], Share(2, 1)),
    ],
)
def test_even_share(dp, nodes, expected):
    found = share(asked(dp), nodes)
    assert found == expected
    assert found.threads == max(1, int(expected.cpus))


def test_given_shares():
    assert share(asked(2, cpus_per_worker=3, gpus_per_worker=0), [Node(8, 1)]) == Share(3, 0)
    assert share(asked(2, gpus_per_worker=0.5), [Node(8, 1)]) == Share(4, 0.5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (asked(2, cpus_per_worker=6, gpus_per_worker=0), ["2 processes", "cluster.cpus_per_worker=6", "8 CPUs"]),
        (asked(1, cpus_per_worker=1.5), ["cluster.cpus_per_worker=1.5", "whole"]),
        (asked(2, gpus_per_worker=1), ["2 processes", "1 GPU each", "room for 1", "parallel.dp"]),
        (asked(2), ["2 processes", "1 GPU each", "room for 1"]),
        (asked(9000, gpus_per_worker=0), ["9,000 processes", "parallel.dp"]),
    ],
)
def test_too_much_is_a_config_error_with_numbers(config, words):
    with pytest.raises(ConfigError) as error:
        share(config, [Node(8, 1)])
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_an_elastic_run_takes_as_many_workers_as_fit():
    elastic = resolve(from_dict({"model": {"vocab_size": 320}, "cluster": {"workers": [2, 8]}}))[0]
    asked = []

    def divide(config):
        asked.append(config.parallel.world_size)
        return share_of_gang(config, [Node(3, 1), Node(3, 2)], wait=False)

    assert share_of_most(elastic, divide).gpus == 1
    assert asked[-1] == 3
    assert 2 not in asked
    with pytest.raises(ConfigError, match="asks for 2 GPUs; the cluster has 1"):
        share_of_most(elastic, lambda config: share_of_gang(config, [Node(8, 1)], wait=False))

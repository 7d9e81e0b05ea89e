"""The order of data: bijections without state."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.read.order import BLOCK, EpochOrder, Interleave, Permutation, shuffled

SHUFFLED = [2, 4, 6, 5, 1, 7, 0, 3]
PERMUTED = [6, 3, 4, 2, 5, 7, 0, 1]
PLACES = [(0, 3, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 2, 0), (71, 3, 1)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permutation_is_a_bijection_with_an_inverse(size: int):
    permutation = Permutation(size, key=7)
    image = [permutation(i) for i in range(size)]
    assert sorted(image) == list(range(size))
    assert [permutation.inverse(i) for i in image] == list(range(size))


def test_permutation_of_a_huge_range():
    permutation = Permutation(10**13 + 7, key=1)
    for index in (0, 1, 12345678901, 10**13 + 6):
        assert permutation.inverse(permutation(index)) == index
    with pytest.raises(IndexError):
        permutation(10**13 + 7)


def test_shuffle_is_fixed_for_all_time():
    """Written down, so that a new version of numpy or of this code cannot silently change the order of a run."""
    assert shuffled(8, 0).tolist() == SHUFFLED
    assert [Permutation(8, 0)(i) for i in range(8)] == PERMUTED
    order = EpochOrder(groups=5, windows=3, last_windows=2, key=0)
    assert [tuple(order(i)) for i in (0, 1, 2, 13, 14, 1000)] == PLACES


@pytest.mark.parametrize("groups", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize(("windows", "last"), [(1, 1), (4, 4), (4, 1), (7, 3)])
def test_an_epoch_holds_every_window_once(groups: int, windows: int, last: int):
    for key in range(3):
        order = EpochOrder(groups, windows, last, key)
        expected = {(g, w) for g in range(groups) for w in range(windows if g < groups - 1 else last)}
        assert order.size == len(expected)
        for epoch in range(2):
            places = [order(epoch * order.size + position) for position in range(order.size)]
            assert {place.epoch for place in places} == {epoch}
            assert len(places) == len({place[1:] for place in places})
            assert {place[1:] for place in places} == expected


def test_order_has_no_state():
    order = EpochOrder(groups=3 * BLOCK, windows=5, last_windows=2, key=3)
    in_turn = [order(i) for i in range(2 * order.size)]
    for index in np.random.default_rng(0).permutation(2 * order.size)[:300].tolist():
        assert EpochOrder(3 * BLOCK, 5, 2, 3)(index) == order(index) == in_turn[index]
    assert in_turn[: order.size] != [place._replace(epoch=0) for place in in_turn[order.size :]]
    assert EpochOrder(3 * BLOCK, 5, 2, 4)(0) != in_turn[0]


def test_few_row_groups_are_in_use_at_once():
    order = EpochOrder(groups=10 * BLOCK, windows=8, last_windows=8, key=0)
    seen = [order(i).group for i in range(order.size)]
    for block in range(10):
        assert len(set(seen[block * BLOCK * 8 : (block + 1) * BLOCK * 8])) == BLOCK


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [3, 1], [0.7, 0.2, 0.0999, 0.0001]])
def test_mixture_keeps_its_proportions_and_counts_exactly(weights: list[float]):
    interleave = Interleave(weights, key=12345)
    counts = Counter[int]()
    for index in range(20000):
        source, before = interleave(index)
        assert before == counts[source]
        counts[source] += 1
        for other, weight in enumerate(weights):
            expected = (index + 1) * weight / sum(weights)
            assert abs(counts[other] - expected) < 6  # discrepancy grows with the logarithm only
    assert Interleave(weights, key=12345)(10**12)[1] == pytest.approx(
        10**12 * weights[interleave(10**12)[0]] / sum(weights), abs=20
    )

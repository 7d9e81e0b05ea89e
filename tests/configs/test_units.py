"""Counts, sizes and durations as a person reads them."""

import math

import pytest

from configs import counted
from configs.units import byte_size, duration, seconds_in, short


@pytest.mark.parametrize(
    ("number", "what", "said"),
    [
        (0, "file", "0 files"), (1, "file", "1 file"), (2, "file", "2 files"), (1000, "process", "1,000 processes"),
        (1, "process", "1 process"), (1.0, "CPU", "1 CPU"), (0.5, "CPU", "0.5 CPUs"), (8.0, "GPU", "8 GPUs"),
        (2, "batch", "2 batches"),
    ],
)  # fmt: skip
def test_counted(number, what, said):
    assert counted(number, what) == said


def test_counted_with_a_verb():
    assert counted(1, "record", "is/are") == "1 record is"
    assert counted(2, "record", "is/are") == "2 records are"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0"), (1, "1"), (999, "999"), (999.6, "1k"), (1234, "1.23k"), (999_499, "999k"), (999_500, "1M"),
        (1.24e9, "1.24B"), (15e12, "15T"),
    ],
)  # fmt: skip
def test_short(count, said):
    assert short(count) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (512, "512 B"), (4900, "4.9 kB"), (2_500_000, "2.5 MB"), (80e9, "80 GB"), (999.6e9, "1 TB")],
)
def test_byte_size(count, said):
    assert byte_size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (4.561, "4.56 s"), (59.94, "59.9 s"), (59.96, "1 min"),
        (123, "2 min 3 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h"), (3720, "1 h 2 min"), (48 * 3600, "2.0 days"),
        (1.8e8, "2,083.3 days"), (math.inf, "inf days"),
    ],
)  # fmt: skip
def test_duration(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("seconds", [0, 0.0123, 4.56, 123, 3720, 2.5 * 86400, 2000 * 86400])
def test_a_duration_is_read_again(seconds):
    assert seconds_in(duration(seconds)) == pytest.approx(seconds)


def test_what_is_no_duration():
    assert seconds_in("soon, 12 seconds") is None

"""One is not many."""

import pytest

from configs import counted


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

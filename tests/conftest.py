"""Fixtures shared by all tests: prepared data, and processes that are started once."""

import os

# Before torch is imported, here and in every process the tests start: two cores are all there is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
from support import Pair, prepare_tiny


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of a few prepared text files, byte-level tokens."""
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pair():
    """Two processes in one gloo group, for all tests that need two."""
    with Pair() as processes:
        yield processes

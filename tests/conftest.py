"""Fixtures shared by all tests: prepared data, and processes that are started once."""

import os
import signal
import sys
from collections import Counter

# Before torch is imported, here and in every process the tests start: two cores are all there is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# As in pyproject.toml, in the processes that the tests start.
os.environ.setdefault("PYTHONWARNINGS", "error:event outside the table")

import pytest
from sharing_out import OneRay, starts_ray
from support import Pair, prepare_tiny

from cluster import cli

# As on a terminal, in all that the tests start: under nohup, or behind a script's `&`, they would be ignored.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # or the files of most tests would come first
    return OneRay(config, log)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    """Where a test says how many of its parameters are quick, the others are slow.

    In several processes: what starts a Ray first, as it takes longest; folders of short tests last.
    """
    seen = Counter()
    for item in items:
        if few := item.get_closest_marker("few"):
            seen[test := item.nodeid.partition("[")[0]] += 1
            if seen[test] > few.args[0]:
                item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (starts_ray(item.path), item.path.parent), reverse=True)


@pytest.fixture(autouse=True)
def same_umask():
    """Every command sets the umask of its process, which is the tests' own where it runs in theirs."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of a few prepared text files, byte-level tokens."""
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pair():
    """Two processes in one gloo group, for all tests that need two."""
    with Pair() as processes:
        yield processes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One folder of runs, and so one MLflow store, for all tests of a module: making its tables takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def quiet_shipper(monkeypatch):
    """What sends records in this process looks for no tracker in the environment, and draws nothing."""
    from trainer.tracking.shipper import Shipper

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(Shipper, "plot", lambda self: None)  # tests/trainer/observe/test_plots.py


@pytest.fixture
def muster(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        os.umask(0)
        monkeypatch.setattr(sys, "argv", ["muster", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run

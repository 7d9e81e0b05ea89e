"""A killed compilation's lock is removed, a held one stays, and an old one that may be either is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import set_variable
from support import tiny, train_in_process
from torch.utils.cpp_extension import _get_build_directory

from configs import ConfigError
from trainer.processes import compile_locks
from trainer.processes.compile_locks import COMPILES, LOCAL, locks, look, mend_compile_locks
from trainer.run.folder import prepare_run

HOLD = """
import importlib.util, sys, time
folder = importlib.util.find_spec("torch").submodule_search_locations[0]  # importing torch takes seconds
spec = importlib.util.spec_from_file_location("file_baton", f"{folder}/utils/file_baton.py")
spec.loader.exec_module(baton := importlib.util.module_from_spec(spec))
assert baton.FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(3600)
"""
COMPILE = """
import sys
from torch.utils.cpp_extension import load_inline
load_inline("slow", "#include <torch/extension.h>\\nint one() { return 1; }", functions=["one"])
"""


def holding(lock: Path) -> subprocess.Popen:
    lock.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def left_behind(lock: Path) -> None:
    process = holding(lock)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.exists()


@pytest.fixture
def root(tmp_path, monkeypatch):
    if compile_locks.file_system(tmp_path) not in LOCAL:
        pytest.skip("the temporary folder is on a file system of several machines")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def test_a_lock_left_by_a_killed_process_is_removed(root, capsys):
    lock = root / "cpu_adam" / "lock"
    left_behind(lock)
    assert look(lock).state == "stale"
    assert mend_compile_locks() == [lock]
    assert not lock.exists()
    assert capsys.readouterr().err == (
        f"removed {lock}: a compilation that was killed left it, and no process holds it\n"
    )
    assert mend_compile_locks() == []


def test_a_held_lock_stays(root):
    lock = root / "cpu_adam" / "lock"
    process = holding(lock)
    try:
        assert look(lock).state == "held"
        os.utime(lock, (0, 0))  # however old
        assert mend_compile_locks() == []
        assert lock.exists()
    finally:
        process.kill()
        process.wait()
    assert mend_compile_locks() == [lock]


def test_locks_are_found_where_torch_keeps_them(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = Path(_get_build_directory("op", False)) / "lock"
    lock.touch()
    assert locks() == [lock]


@pytest.mark.slow
def test_a_lock_that_torch_itself_has_left(root):
    process = subprocess.Popen([sys.executable, "-c", COMPILE], start_new_session=True, stderr=subprocess.DEVNULL)
    lock, until = root / "slow" / "lock", time.monotonic() + 60
    while not lock.exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    assert look(lock).state == "held"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert mend_compile_locks() == [lock]


@pytest.mark.parametrize("where", ["nfs", "fuse.sshfs"])
def test_a_lock_that_another_machine_may_hold_is_left_alone_then_refused(root, monkeypatch, capsys, where):
    monkeypatch.setattr(compile_locks, "file_system", lambda path: where)
    lock = root / "cpu_adam" / "lock"
    left_behind(lock)
    assert mend_compile_locks() == []
    said = f"other machines may write to its file system ({where})"
    assert said in capsys.readouterr().err
    before = time.time() - COMPILES - 60
    os.utime(lock, (before, before))
    with pytest.raises(ConfigError) as caught:
        mend_compile_locks()
    assert str(caught.value) == (
        f"{lock} is the lock of a compilation that began 16 min ago; this run would wait for it for ever.\n"
        f"Whether anybody holds it cannot be told from here, as {said}: if no process compiles there, remove {lock}"
    )
    assert lock.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file away")
def test_another_users_lock_is_not_removed(root):
    lock = root / "cpu_adam" / "lock"
    left_behind(lock)
    os.chown(lock, 12345, 12345)
    assert look(lock).state == "unknown"
    assert mend_compile_locks() == []


def test_a_run_removes_stale_locks_before_its_plugins_compile(root, tmp_path, tiny_data):
    plugin = tmp_path / "compiles.py"
    plugin.write_text(
        "import os\nfrom torch.utils.file_baton import FileBaton\n"
        "baton = FileBaton(os.environ['TORCH_EXTENSIONS_DIR'] + '/cpu_adam/lock')\n"
        "baton.try_acquire() or baton.wait()\n"
        "baton.release()\n"
    )
    lock = root / "cpu_adam" / "lock"
    left_behind(lock)
    config = tiny(run={"name": "run", "root": str(tmp_path)}, data={"path": str(tiny_data)}, train={"steps": 1})
    run_dir = prepare_run(config.model_copy(update={"plugins": (str(plugin),)}))
    assert not lock.exists()
    left_behind(lock)
    assert train_in_process(run_dir, set_variable, "TORCH_EXTENSIONS_DIR", str(root)) == 0
    assert not lock.exists()

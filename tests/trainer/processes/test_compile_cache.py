"""What torch.compile leaves behind, and what the record says of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import set_variable
from support import tiny, train_in_process

from models.tasks.task import Change
from trainer.processes import compiled
from trainer.processes.compiled import SETTLED, Compilations, cache_folder, keep_compiled
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "file_system", lambda path: "ext4")
    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(compiled, "make_folder", lambda: tmp_path / "muster-new")
    return tmp_path / "cache" / "muster" / "compile"


def test_the_folder_is_the_users_own_and_stays(cache):
    assert cache_folder() == cache_folder() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("why", ["over a network", "others may write", "another's", "a link"])
def test_another_folder_if_it_is_not_private_and_local(cache, tmp_path, monkeypatch, why):
    cache.parent.mkdir(parents=True)
    if why == "over a network":
        monkeypatch.setattr(compiled, "file_system", lambda path: "nfs4" if path == cache else "ext4")
    elif why == "others may write":
        cache.mkdir()
        cache.chmod(0o777)
    elif why == "a link":
        cache.symlink_to(tmp_path)
    elif os.getuid():
        pytest.skip("only root may give a folder away")
    else:
        cache.mkdir()
        os.chown(cache, 12345, 12345)
    other = tmp_path / f"muster-compile-{os.getuid()}"
    assert cache_folder() == other
    other.chmod(0o777)
    assert cache_folder() == tmp_path / "muster-new"


def test_the_users_settings_are_kept(cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    del os.environ["TRITON_CACHE_DIR"]
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert os.environ["TRITON_CACHE_DIR"] == str(cache / "triton")


def test_a_late_recompilation_is_told_with_its_reason():
    torch._dynamo.reset()
    seen = Compilations()
    assert not seen.any
    double = torch.compile(lambda x: x * 2, backend="aot_eager", dynamic=False)
    changes: list[list[Change]] = []
    for step in range(1, SETTLED + 4):
        double(torch.ones({3: 4, SETTLED + 2: 5}.get(step, 3)))
        changes.append(seen.after_step())
    [told] = changes.pop(SETTLED + 1)
    assert told.event == "recompiled"
    assert "expected 3, actual 5" in told.details["reason"]
    assert not any(changes)
    summary = seen.summary()
    assert (summary["graphs"], summary["recompilations"], summary["graph_breaks"]) == (3, 2, 0)
    assert summary["seconds"] > 0
    assert seen.summary() == summary


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_next_attempt_compiles_nothing(tmp_path, tiny_data):
    def attempt(steps: int) -> dict:
        config = tiny(
            run={"name": "run", "root": str(tmp_path)},
            model={"num_experts": 0},
            data={"path": str(tiny_data)},
            train={"steps": steps, "compile": True},
        )
        run_dir = prepare_run(config)
        assert train_in_process(run_dir, set_variable, "XDG_CACHE_HOME", str(tmp_path / "cache")) == 0
        return [event for event in read_events(run_dir) if event["event"] == "compiled"][-1]

    first, second = attempt(2), attempt(4)
    assert first["cache_misses"] > 0
    assert (second["cache_misses"], second["cache_hits"]) == (0, first["cache_misses"] + first["cache_hits"])
    assert second["graphs"] == first["graphs"]


@pytest.mark.slow
def test_forks_get_the_compiler_from_their_parent():
    """In a process of its own, as another test may have imported it here."""
    code = "import sys; from trainer.processes.compiled import load_compiler; load_compiler(); "
    code += "print({'torch._dynamo', 'torch._inductor.compile_fx'} <= sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

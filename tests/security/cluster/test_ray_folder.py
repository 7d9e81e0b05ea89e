"""Nobody else of the machine gets to what Ray and the queue keep there, from which the owner's jobs run."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from muster_cluster import free_port
from second_user import NOBODY, as_second_user, let_in, needs_second_user

from cluster.commands.doctor import _ray_folders
from cluster.gangs import join
from cluster.gangs.ray_folder import (
    LONGEST,
    open_to_others,
    private_folder,
    ray_folder,
    ray_parent,
    remove_dead_sessions,
)
from configs import ConfigError

TRY_ALL = """
import os, socket, sys
for path in sys.stdin.read().splitlines():
    for attempt in (os.listdir, open, lambda path: open(path, "a"), os.lstat,
                    lambda path: socket.socket(socket.AF_UNIX).connect(path)):
        try:
            attempt(path)
            print(path)
        except OSError:
            pass
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_private_folder(tmp_path):
    folder = private_folder(tmp_path / "a" / "b", "--key")
    assert mode(folder) == 0o700
    folder.chmod(0o777)
    assert mode(private_folder(folder, "--key")) == 0o700
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch()
    for other in ("link", "file"):
        with pytest.raises(ConfigError, match="set --key to another"):
            private_folder(tmp_path / other, "--key")


@needs_second_user
def test_someone_elses_folder_is_refused(tmp_path):
    (tmp_path / "his").mkdir()
    os.chown(tmp_path / "his", NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"his belongs to user {NOBODY}: set --key to another"):
        private_folder(tmp_path / "his", "--key")


@pytest.fixture
def common(monkeypatch):
    """A folder that everyone writes into, like /tmp, with a short path."""
    folder = Path("/tmp") / f"mc-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder))
    yield folder
    shutil.rmtree(folder)


def test_rays_folder_lies_in_one_of_the_owners(common):
    assert ray_folder(None) == ray_parent() / "ray"
    assert ray_parent().parent == common
    assert mode(ray_parent()) == 0o700
    assert ray_folder(str(common / "new")) == common / "new" / "ray"
    assert mode(common / "new") == 0o700
    assert ray_folder(str(common / "new" / "below")) == common / "new" / "below"  # others do not get there
    assert not (common / "new" / "below").exists()


@pytest.mark.parametrize(
    ("prepare", "given", "words"),
    [
        (lambda c: (c / "x").mkdir(mode=0o755), "x", "is open to other users"),
        (lambda c: (c / "x").symlink_to("/tmp"), "x", "is open to other users"),
        (lambda c: (c / "x").touch(), "x", "is open to other users"),
        (lambda c: None, "x" * LONGEST, f"more than {LONGEST} characters"),
        (lambda c: c.chmod(0o777), "x", "lets other users rename"),
        (lambda c: None, "", "is empty: name a folder"),
        (lambda c: (c / f"muster-ray-{os.geteuid()}").symlink_to("/tmp"), None, "set --temp-dir=FOLDER to another"),
    ],
)
def test_another_folder_for_ray_is_refused(common, muster, monkeypatch, prepare, given, words):
    prepare(common)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(common / "token"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for module, name in ((os, "execv"), (join, "run_head")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("Ray was started"))
    option = [] if given is None else [f"--temp-dir={common / given if given else ''}"]
    for command in (["up"], ["join", "127.0.0.1:1"]):
        code, _, err = muster("cluster", *command, *option)
        assert code == 2
        assert words in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("given", [[], ["--temp-dir", "x"], ["--temp-dir=x"]])
def test_ray_is_started_in_it(common, muster, monkeypatch, given):
    monkeypatch.chdir(common)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(common / "token"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    started, before = [], os.umask(0o022)

    def start(arguments):
        started.append((arguments, os.umask(0o022)))
        return 0

    def run_head(ray, server):
        [address] = [each for each in server if each.startswith("--address=127.0.0.1:")]
        assert f"--port={address.rpartition(':')[2]}" in ray
        assert not address.endswith(":0")
        return start(ray)

    monkeypatch.setattr(join, "run_head", run_head)
    monkeypatch.setattr(os, "execv", lambda program, arguments: sys.exit(start(arguments)))
    try:
        with socket.create_server(("127.0.0.1", 0)) as head:
            for command in (
                ["up", "--port=0", "--dashboard-port=0", f"--server-port={free_port()}"],
                ["join", f"127.0.0.1:{head.getsockname()[1]}"],
            ):
                assert muster("cluster", *command, "--num-cpus=1", *given)[0] == 0
    finally:
        os.umask(before)
    folder = common / "x" / "ray" if given else ray_parent() / "ray"
    assert len(started) == 2
    for arguments, umask in started:
        assert [each for each in arguments if each.startswith("--temp-dir")] == [f"--temp-dir={folder}"]
        assert "--num-cpus=1" in arguments
        assert "x" not in arguments
        assert umask == 0o077


@pytest.mark.parametrize(
    ("modes", "opened"),
    [
        ((0o755, 0o777), True),
        ((0o711, 0o777), True),
        ((0o755, 0o755), False),
        ((0o700, 0o777), False),
        ((0o750, 0o777), True),
    ],
)  # fmt: skip
def test_what_others_can_change(common, modes, opened):
    (common / "a" / "b").mkdir(parents=True)
    (common / "a" / "b").chmod(modes[1])
    (common / "a").chmod(modes[0])
    assert open_to_others(common / "a" / "b") == opened


# Of a live cluster.


@pytest.mark.ray
@needs_second_user
def test_a_second_user_gets_to_nothing_of_a_live_cluster(live):
    let_in(live.runs.parent)
    shared = set()
    for process in psutil.Process(live.head.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            shared |= {entry.path for entry in process.open_files() if entry.path.startswith("/dev/shm")}
    every = [live.folder, *live.folder.rglob("*"), live.runs.parent / "queue", *(live.runs.parent / "queue").iterdir()]
    sockets = [path for path in every if path.is_socket()]
    assert {path.name for path in sockets} >= {"raylet", "plasma_store"}
    paths = [str(path) for path in (*every, live.token)] + sorted(shared)
    listed = live.runs.parent / "paths"
    listed.write_text("\n".join(paths))
    listed.chmod(0o644)
    found = as_second_user("import sys; sys.stdin = open(sys.argv[1])\n" + TRY_ALL, listed, imports=["socket"])
    assert found.returncode == 0, found.stderr
    # That a name is there is told by the folder above, which is the test's.
    assert set(found.stdout.splitlines()) <= {str(live.folder), str(live.runs.parent / "queue"), str(live.token)}
    for path in (live.folder, live.runs.parent / "queue"):
        assert mode(path) == 0o700
    assert mode(live.token) == 0o600


@pytest.mark.ray
def test_files_and_sockets_of_ray_are_its_owners_alone(live):
    made = [path for path in live.folder.rglob("*") if not path.is_symlink() and (path.is_file() or path.is_socket())]
    assert made
    assert [path for path in made if mode(path) & 0o077] == []


@pytest.mark.ray
def test_a_session_that_others_can_write_into_is_named(live, capsys):
    [session] = live.folder.glob("ray/session_2*")
    assert not open_to_others(session)
    assert [finding.state for finding in _ray_folders()] == ["ok"]
    live.folder.chmod(0o755)
    try:
        [finding] = _ray_folders()
        assert finding.state == "note"
        assert str(session) in finding.found
        assert "muster cluster up" in finding.mend
    finally:
        live.folder.chmod(0o700)


def test_sessions_that_have_ended_are_removed(tmp_path):
    names = ("session_2026-01-01_dead", "session_2026-01-01_live", "session_2026-01-01_young", "other")
    for name in names:
        (tmp_path / name / "runtime_resources").mkdir(parents=True)
        (tmp_path / name / "runtime_resources" / ".env").write_text("PASSWORD=1")
        if "young" not in name:
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / "session_2_link").symlink_to(tmp_path / "other")
    (tmp_path / "session_latest").symlink_to(tmp_path / names[1])
    command = ["sh", "-c", "read x", f"--session_dir={tmp_path / names[1]}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as live:
        while psutil.Process(live.pid).cmdline() != command:  # for a moment after it has started, it has none
            time.sleep(0.01)
        remove_dead_sessions(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[1:], "session_2_link", "session_latest"}
    assert (tmp_path / "other" / "runtime_resources" / ".env").exists()

"""A lock file keeps other processes out, is never a link, and is released when its process ends."""

import os
import subprocess
import sys

import pytest
from filelock import Timeout

from trainer.files.lock_file import lock_file

HOLDS = """
import sys
from pathlib import Path
from trainer.files.lock_file import lock_file
with lock_file(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_kept_out_until_the_holder_is_killed(tmp_path, holder):
    with pytest.raises(Timeout):
        lock_file(tmp_path / "lock", patience=0).acquire()
    holder.kill()
    holder.wait()
    with lock_file(tmp_path / "lock", patience=0):
        pass


def test_the_content_of_the_file_stays(tmp_path):
    (tmp_path / "lock").write_text("kept")
    with lock_file(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "kept"


def test_links_are_refused_and_only_the_owner_has_access(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        lock_file(tmp_path / "link", patience=0).acquire()
    assert not (tmp_path / "other").exists()
    before = os.umask(0)
    try:
        with lock_file(tmp_path / "lock"):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)

"""Another user of the same machine, to test what that user must not be able to do."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

NOBODY = 65534
_BECOME_NOBODY = """
import importlib, os, sys
for name in sys.argv[2].split(","):
    importlib.import_module(name)
os.chdir("/")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.umask(0)
code = sys.argv[1]
del sys.argv[1:3]
exec(code)
"""

needs_second_user = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can start a process of a second user"
)


def as_second_user(
    code: str, *arguments: object, imports: Sequence[str] = (), timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run Python code as a user with none of our permissions, with umask 0. Returns its output and exit code.

    Args:
        arguments: its sys.argv[1:].
        imports: modules to import while still running as us: the user may be unable to read the interpreter's folder.
    """
    command = [sys.executable, "-c", _BECOME_NOBODY, code, ",".join(["traceback", *imports]), *map(str, arguments)]
    return subprocess.run(command, env={"PATH": os.defpath}, text=True, capture_output=True, timeout=timeout)


def let_in(folder: Path) -> Path:
    """Open a test's folder and pytest's above it, so that only the code under test keeps others out. Returns it."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid() and above not in (Path("/"), Path.home(), *Path.home().parents):
            above.chmod(above.stat().st_mode | 0o055)
    return folder

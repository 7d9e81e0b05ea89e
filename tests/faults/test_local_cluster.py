"""`deploy/local-cluster`: what it refuses, and that it ends exactly what it began, with and without namespaces."""

import os
import re
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from local_cluster import ROOT, LocalCluster, missing

SCRIPT = str(ROOT / "deploy" / "local-cluster")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status"], "no cluster in"),
        (["--folder", f"/tmp/{'x' * 40}", "up", "3"], "at most 40 characters"),
        (["up", "0"], "at least 1"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, words):
    folder = [] if "--folder" in arguments else ["--folder", str(tmp_path / "c")]
    done = subprocess.run([sys.executable, SCRIPT, *folder, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def below(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names a folder."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False], ids=["namespaces", "loopback"])
def test_nodes_come_go_and_leave_nothing(tmp_path, apart):
    if apart and missing():
        pytest.skip(missing())
    with LocalCluster(2, tmp_path, *([] if apart else ["--loopback"])) as cluster:
        token = cluster.folder / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{cluster.url}/api/jobs", timeout=10)
        assert refused.value.code == 401
        assert "no jobs" in cluster.muster("jobs")
        names = cluster.do("exec", "1", "sh", "-c", "cat /proc/sys/kernel/hostname; echo $RAY_ADDRESS").split()
        assert names[0] == ("node-1" if apart else os.uname().nodename)

        cluster.do("kill", "1")
        assert re.search(r"^node 1: \S+ 2 CPUs, 0 processes,", cluster.do("status"), re.MULTILINE)
        cluster.do("start", "1")
        assert re.findall(r"processes, (.*)$", cluster.do("status"), re.MULTILINE)[1] == "alive"
        if apart:
            assert not cannot_reach_head(cluster, "1")
            cluster.do("cut", "1")
            assert ", cut" in cluster.do("status").splitlines()[1]
            assert cannot_reach_head(cluster, "1")
            cluster.do("heal", "1")
            assert ", cut" not in cluster.do("status")
            cluster.do("kill", "0")
            for process in below(cluster.folder):  # node 1 misses the head after a while, and ends
                process.kill()
            cluster.do("start", "0")
            assert re.findall(r"processes, (.*)$", cluster.do("status"), re.MULTILINE) == ["alive", "alive"]
        assert below(cluster.folder)
        assert token.read_text() not in cluster.do("status")
    assert below(cluster.folder) == []
    assert not cluster.folder.exists()
    if apart:
        number = cluster.url.split(".")[2]
        spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert f"muster-{number}-" not in spaces
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
        assert f"muster-{number}:" not in links


def cannot_reach_head(cluster: LocalCluster, node: str) -> bool:
    """Whether a connection from a node to the cluster's server fails."""
    host, port = cluster.url.removeprefix("http://").split(":")
    code = f"import socket; socket.create_connection(('{host}', {port}), timeout=3)"
    command = [sys.executable, SCRIPT, "--folder", str(cluster.folder), "exec", node, sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True).returncode == 1

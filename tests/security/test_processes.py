"""Whatever ends a process, by kill -9 too, what it started ends within seconds, and its temporary folder goes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ranks import free_port
from second_user import as_second_user, let_in, needs_second_user
from support import tiny

from cluster.gangs.worker import ENVIRONMENT
from configs import to_yaml
from trainer.files.scratch import LOCK, make_folder, remove_folder, sweep
from trainer.run.folder import prepare_run

ENDS = 5.0
"""Seconds that it may take."""
PATIENCE = 90.0
WORD = "5a" * 32
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in OF_A_GROUP} | more


@contextmanager
def started(command: list[str], **settings) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, **settings)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()


def wait_until(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def ends(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after a while."""
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=2 * ENDS)
    return [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("forks", [True, False])
def test_a_rank_in_the_rendezvous_ends_with_its_warm_process(tmp_path, tiny_data, forks):
    """It waits there for another that never comes, which it would do for half an hour."""
    run_dir = prepare_run(tiny(run={"name": "run", "root": str(tmp_path)}, data={"path": str(tiny_data)}))
    # A second thread, which no fork would have, is why it begins its attempts anew.
    environment = clean(**(ENVIRONMENT if forks else {"JE_ARROW_MALLOC_CONF": "background_thread:true"}))
    command = [sys.executable, "-P", "-m", "trainer.processes.warm"]
    with started(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as warm:
        group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        job = {"run_dir": str(run_dir), "folder": "/", "environment": group, "patience": 0}
        store = tmp_path / "store"
        warm.stdin.write(json.dumps(job | {"secret": WORD, "store": str(store)}) + "\n")
        warm.stdin.flush()
        attempt = psutil.Process(json.loads(warm.stdout.readline())["pid"])
        wait_until(store.exists)
        assert forks == (attempt.cmdline()[-1] == "trainer.processes.warm")
        assert WORD not in " ".join(attempt.cmdline())
        warm.kill()
        assert ends([attempt]) == []


@pytest.mark.slow
def test_ranks_end_with_torchruns_agent(tmp_path, tiny_data):
    """They have a secret, which the user has set, and use the agent's store all the same."""
    config = tiny(run={"name": "run", "root": "runs"}, data={"path": str(tiny_data)}, train={"steps": 10**6})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "trainer", "c.yaml", "parallel.dp=2"]
    with started(
        command, cwd=tmp_path, env=clean(MUSTER_SECRET=WORD), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as agent:
        wait_until((tmp_path / "runs" / "run").exists)
        ranks = psutil.Process(agent.pid).children()
        agent.kill()
        assert ends(ranks) == []


ENCODES = """
import time
from trainer.data.prepare import encode, pool
from trainer.data.prepare.splitting import Splitting
spec = encode.EncodeSpec("", True, 0, 257, "uint16", "text", Splitting(0.0, 0), 1 << 28, 10)
workers = pool._Workers(2, spec)
print(*(worker._process.pid for worker in workers.idle), flush=True)
time.sleep(600)
"""


def is_bounded(process: psutil.Process) -> bool:
    return process.rlimit(psutil.RLIMIT_AS)[0] != psutil.RLIM_INFINITY


@pytest.mark.few(1)
@pytest.mark.parametrize("busy", [False, True])
def test_tokenizing_workers_end_with_what_started_them(busy):
    """In the middle of a batch too, for which a stopped one stands: it reads nothing any more."""
    with started([sys.executable, "-c", ENCODES], env=clean(), text=True, stdout=subprocess.PIPE) as process:
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        # Its bound on memory is set after what ties it to its parent.
        wait_until(lambda: all(is_bounded(worker) for worker in workers))
        if busy:
            for worker in workers:
                worker.suspend()
        process.kill()
        assert ends(workers) == []


HOLDS = """
import sys, time
from trainer.files.scratch import make_folder
folder = make_folder(sys.argv[1])
(folder / "of a session").mkdir()
print(folder, flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


def holding(within: Path, then: str = "wait"):
    command = [sys.executable, "-c", HOLDS, str(within), then]
    return started(command, env=clean(), text=True, stdout=subprocess.PIPE)


def test_a_folder_goes_with_its_process_or_at_the_next_start(tmp_path):
    with holding(tmp_path, "end") as process:
        first = Path(process.stdout.readline().strip())
        process.wait(PATIENCE)
        assert not first.exists()
    with holding(tmp_path) as process:
        second = Path(process.stdout.readline().strip())
        assert second.stat().st_mode & 0o777 == 0o700
        third = make_folder(str(tmp_path))
        assert {second, third} == set(tmp_path.iterdir())  # somebody holds it
        process.kill()
        process.wait()
        assert second.exists()
        remove_folder(third)
        fourth = make_folder(str(tmp_path))
        assert set(tmp_path.iterdir()) == {fourth}
        remove_folder(fourth)
    assert list(tmp_path.iterdir()) == []


SWEPT = """
import sys, time
from trainer.processes.orphans import sweep_after
from trainer.files.scratch import make_folder, remove_folder
folder = make_folder(sys.argv[1])
sweep_after(str(folder))
(folder / "token").write_text("secret")
print("there", flush=True)
time.sleep(60)
"""


def test_a_folder_goes_soon_after_its_process_was_killed(tmp_path):
    (tmp_path / "kept").mkdir()
    command = [sys.executable, "-P", "-c", SWEPT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout.readline() == "there\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.kill()
        assert process.stdout.read() == ""  # what waits holds nothing of it open
    wait_until(lambda: [path.name for path in tmp_path.iterdir()] == ["kept"])


def test_only_what_is_surely_ours_goes(tmp_path):
    kept = [tmp_path / name for name in ("muster-compile-0", "muster-abcdefgh", "muster-12345678", "other-12345678")]
    for path in kept:
        path.mkdir(mode=0o700)
    for path in (kept[0], kept[3]):  # not by the name; the second has no lock, the third is open to others
        (path / LOCK).touch()
    (kept[2] / LOCK).touch()
    kept[2].chmod(0o755)
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (target / LOCK).touch()
    (tmp_path / "muster-linklink").symlink_to(target)
    (tmp_path / "muster-locklink").mkdir(mode=0o700)
    (tmp_path / "muster-locklink" / LOCK).symlink_to(target / LOCK)
    (tmp_path / "muster-fifofifo").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "muster-afileafi")
    before = sorted(tmp_path.rglob("*"))
    sweep(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


PLANTS = """
import os, sys
os.mkdir(sys.argv[1], 0o700)
open(sys.argv[1] + "/lock", "w").close()
os.symlink(sys.argv[2], sys.argv[1] + "/link")
"""


@needs_second_user
def test_a_second_users_folder_is_left_alone_and_leads_nowhere(tmp_path):
    let_in(tmp_path).chmod(0o1777)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    planted = tmp_path / "muster-planted1"
    done = as_second_user(PLANTS, planted, precious)
    assert done.returncode == 0, done.stderr
    sweep(tmp_path)
    assert planted.exists()
    # Within one of ours a link is removed, not followed.
    with holding(tmp_path) as process:
        folder = Path(process.stdout.readline().strip())
        (folder / "link").symlink_to(precious)
        (folder / "of a session" / "link").symlink_to(precious)
        process.kill()
        process.wait()
    sweep(tmp_path)
    assert not folder.exists()
    assert (precious / "file").exists()


@pytest.mark.slow
def test_imports_leave_nothing_in_the_folder_for_temporary_files(tmp_path):
    environment = clean(TMPDIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path.parent / "cache"))
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    subprocess.run(
        [sys.executable, "-P", "-c", "import trainer.processes.warm, cluster.attempts.launch"],
        env=environment,
        check=True,
    )
    assert list(tmp_path.iterdir()) == []
    made = [tmp_path.parent / "cache" / "muster", tmp_path.parent / "cache" / "muster" / "compile"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700, 0o700]

"""Nobody but the run's own processes joins it: a second user tries to, at the store and at the folder it lies in."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import strangers
from ranks import free_port
from second_user import as_second_user, let_in, needs_second_user
from support import forking
from teams import in_team

from trainer.files.scratch import make_folder, remove_folder
from trainer.processes.rendezvous import SECRET, STORE

WORD = "5a" * 32
PATIENCE = 60


@contextmanager
def starting(ranks: list[int], **environment: str) -> Iterator[list[Any]]:
    """Some processes of an attempt of two, forked from one that has imported everything; yields their pipes."""
    context = forking()
    same = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} | environment
    pipes, processes = [], []
    for rank in ranks:
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=strangers.start_alone, args=(rank, same, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    try:
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def answer(pipe: Any) -> Any:
    assert pipe.poll(PATIENCE), "no answer"
    return pipe.recv()


@pytest.fixture
def folder() -> Iterator[Path]:
    found = make_folder()
    yield found
    remove_folder(found)


@pytest.mark.parametrize("secret", ["", WORD])
def test_on_one_machine_nothing_listens_but_on_loopback(folder, secret):
    """Whatever torch and DeepSpeed open for an attempt that was given a file."""
    given = {STORE: str(folder / "store"), SECRET: secret, "MASTER_ADDR": "10.1.2.3", "LOCAL_WORLD_SIZE": "2"}
    with starting([0, 1], **given) as (first, second):
        for pipe in (first, second):
            assert answer(pipe) == ([0, 1], ["127.0.0.1"], [])


def test_between_machines_the_store_listens_at_one_address_only():
    given = {SECRET: WORD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with starting([0, 1], **given) as (first, second):
        assert answer(first) == answer(second) == ([0, 1], ["127.0.0.1"], [])


@pytest.mark.parametrize("other", ["other", "", None])
def test_processes_that_do_not_meet_say_why(other):
    """Another secret, none, or no other process at all."""
    given = {SECRET: WORD, "MASTER_PORT": str(free_port()), "TEST_PATIENCE": "4"}
    ranks = [1] if other is not None else []
    with starting([0], **given) as first, starting(ranks, **given | {SECRET: other or ""}) as second:
        for pipe in [*first, *second]:
            said = answer(pipe)
            assert "not all 2 processes of the run joined within cluster.timeout=4 s" in said
            assert f"{SECRET} is the same for all" in said


def test_a_lone_process_listens_nowhere():
    with starting([0], WORLD_SIZE="1", MASTER_PORT=str(free_port())) as [pipe]:
        rank, listening, _ = answer(pipe)
        assert (rank, set(listening) - {"127.0.0.1"}) == ([0], set())


LOOK = """
import os, sys
for call in (os.listdir, lambda path: open(path + "/store", "rb"), lambda path: open(path + "/store", "ab")):
    try:
        print(call(sys.argv[1]))
    except PermissionError:
        print("no")
"""


@needs_second_user
def test_a_second_user_cannot_enter_the_folder_of_a_starting_run(folder):
    let_in(folder.parent)
    with starting([0], **{STORE: str(folder / "store"), SECRET: WORD}):
        until = time.monotonic() + PATIENCE
        while not (folder / "store").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert as_second_user(LOOK, folder).stdout == "no\n" * 3


JOIN = """
import os, pickle, sys, time
from datetime import timedelta
port, how, mark = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"
limit = timedelta(seconds=30)
store = dist.TCPStore("127.0.0.1", port, 2, False, limit)
prefix = ""
while how == "secret" and not prefix:
    time.sleep(0.05)
    found = [key for key in store.list_keys() if len(key.split("/")[0]) == 64]
    prefix = found[0].split("/")[0] if found else ""
print("joins as", prefix, flush=True)
store = dist.PrefixStore(prefix or "default_pg", store)
dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=limit)

class Payload:
    def __reduce__(self):
        return os.mknod, (mark, 0o600)

sent = torch.frombuffer(bytearray(pickle.dumps(Payload())), dtype=torch.uint8)
if how == "secret":  # what `prove` asks for: random words, and then another
    for _ in range(2):
        word = torch.frombuffer(bytearray(b'"' + b"a" * 64 + b'"'), dtype=torch.uint8)
        for each in (torch.tensor([len(word)]), word):
            dist.all_gather([torch.empty_like(each) for _ in range(2)], each)
else:
    for each in (torch.tensor([len(sent)]), sent):
        # The other side's is shorter, and filled up to the longest.
        dist.all_gather([torch.empty_like(each) for _ in range(2)], each)
print("sent", flush=True)
time.sleep(2)
"""
IMPORTS = ["torch", "torch.distributed"]


def attack(port: int, how: str, mark: Path) -> str:
    code = "import torch\nfrom torch import distributed as dist\n" + JOIN
    done = as_second_user(code, port, how, mark, imports=IMPORTS, timeout=120)
    assert done.stdout.endswith("sent\n"), done.stderr
    return done.stdout


@needs_second_user
def test_who_joins_as_a_rank_without_the_secret_is_named_and_the_attempt_ends(tmp_path):
    """Even if he lists the keys of the store, which anyone can, and finds its prefix there."""
    port, mark = free_port(), let_in(tmp_path) / "mark"
    with starting([0], **{SECRET: WORD, "MASTER_PORT": str(port)}) as [pipe]:
        said = attack(port, "secret", mark)
        assert re.search(r"joins as [0-9a-f]{64}\n", said)
        assert WORD not in said
        assert answer(pipe).startswith("the process that joined this run as rank 1 does not know its secret")
    assert not mark.exists()


@needs_second_user
def test_where_there_is_no_secret_what_he_sends_is_not_run(tmp_path):
    """torchrun's own store lets him in; a pickle in the place of a value is refused as no JSON."""
    port, mark = free_port(), let_in(tmp_path) / "mark"
    tmp_path.chmod(0o777)
    with starting([0], MASTER_PORT=str(port)) as [pipe]:
        attack(port, "none", mark)
        assert answer(pipe).startswith("rank 1 sent something that is not JSON")
    assert not mark.exists()


def test_the_same_secret_is_proved_and_another_is_named():
    assert in_team(3, strangers.proves, [WORD] * 3) == ["None"] * 3
    said = in_team(3, strangers.proves, [WORD, "5b" * 32, WORD])
    assert [re.findall(r"rank (\d(?:, \d)*)", text) for text in said] == [["1"], ["0, 2"], ["1"]]


def test_a_port_that_is_taken_or_elsewhere_is_left_to_torch():
    from trainer.processes.rendezvous import _listen

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert _listen(*taken.getsockname()) is None
    assert _listen("240.0.0.1", 1234) is None  # reserved, of no machine
    assert _listen("nowhere.invalid", 1234) is None

"""Any bytes at all in a checkpoint's files: read as the same tensors or refused, within bounds on time and memory."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import EMBED, SHARD, Change, content, manifest, safetensors, seal, states, text
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import store
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.store import Reader


@pytest.fixture(scope="module")
def playground(original, tmp_path_factory):
    """A checkpoint to be changed again and again, and what it holds."""
    path = tmp_path_factory.mktemp("any") / "step-00000002"
    shutil.copytree(folder(original, 2), path)
    return path, states(Reader(path))


EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 6), st.binary(max_size=6) | st.sampled_from(
        [b"-", b"9" * 30, b"null", b"NaN", b"[", b"{", b'"', b"1e999", b"true", b"\\u0000", b"\xff", b"@", b":"]
    )),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(where=st.sampled_from(["manifest", "header"]), edits=EDITS)
def test_any_other_bytes_are_the_same_tensors_or_refused(playground, where, edits):
    path, held = playground
    files = {name: (path / name).read_bytes() for name in ("manifest.json", SHARD)}
    try:
        data = bytearray(files["manifest.json"])
        if where == "header":
            (length,) = struct.unpack_from("<Q", files[SHARD])
            data = bytearray(files[SHARD][8 : 8 + length])
        for at, gone, added in edits:
            at %= len(data) + 1
            data[at : at + gone] = added
        if where == "manifest":
            (path / "manifest.json").write_bytes(data)
        else:
            (path / SHARD).write_bytes(safetensors(bytes(data), files[SHARD][8 + length :]))
            seal(path)
        problems = store.verify(path)
        assert all(problem.isprintable() and len(problem) < 1000 for problem in problems)
        if not problems:
            found = states(Reader(path))
            assert all(torch.equal(found[key], held[key]) for key in found)
            assert found.keys() == held.keys()
    finally:
        for name, content in files.items():
            (path / name).write_bytes(content)


BOMBS = """
import resource, sys
from pathlib import Path
from trainer.checkpoint.store import verify

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10

verify(Path(sys.argv[1]))
room = 500 * 2**20
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))  # ends what does not end
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room,) * 2)
for path in sys.argv[2:]:
    problems = verify(Path(path))
    print((problems[0] if problems else "taken")[:200])
"""


def many(count: int, shape: str, size: int) -> bytes:
    """A header of many fragments, without their numbers' bytes."""
    entries = (
        f'"weight/{EMBED}@{i}":{{"dtype":"F32","shape":{shape},"data_offsets":[{size * i},{size * i + size}]}}'
        for i in range(count)
    )
    return ("{" + ",".join(entries) + "}").encode()


def sparse(path: Path) -> None:
    """A file of a TB that takes no room on the disk."""
    with (path / SHARD).open("r+b") as shard:
        shard.truncate(1 << 40)
    manifest("files", SHARD, "bytes", to=1 << 40)(path)


BIG: dict[str, Change] = {
    "manifest of 1 GB": lambda path: os.truncate(path / "manifest.json", 1 << 30),
    "manifest 10^6 deep": text("[" * 1_000_000),
    "manifest of lists": text("[" + "[]," * 5_000_000 + "[]]"),
    "manifest of mappings": text("[" + '{"a":1},' * 1_800_000 + "{}]"),
    "manifest of numbers": text("[" + "1234," * 3_000_000 + "0]"),
    "manifest of scalars": manifest("scalars", to={f"{i}": 0.5 for i in range(200_000)}),
    "manifest of 50,000 files": manifest(
        "files", to=lambda files: {f"{i}": files[SHARD] | {"name": f"{i}"} for i in range(50_000)}
    ),
    "manifest of states": manifest(
        "shapes", to=lambda shapes: shapes | {f"{i}": {f"{j}": [2] for j in range(300)} for i in range(400)}
    ),
    "shapes of 10^108": manifest("shapes", to={"weight": {f"{i}": [2**53] * 6 for i in range(50_000)}}),
    "header of 2^60": content(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "header of 20 MB": content(lambda data: struct.pack("<Q", 20 << 20) + bytes(20 << 20)),
    "header of empty fragments": content(lambda data: safetensors(many(60_000, "[0]", 0))),
    "header of metadata": content(
        lambda data: safetensors(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(600_000)) + b"}}")
    ),
    "header of spaces": content(lambda data: safetensors(b"{}" + b" " * (15 << 20))),
    "file of 1 TB": sparse,
}


@pytest.mark.slow
def test_bombs_take_neither_long_nor_much_memory(original, tmp_path):
    """In a process that may take 500 MB more than it has at the start, so that more is an error."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    whole = folder(original, 2)
    paths = []
    for number, change in enumerate(BIG.values()):
        paths.append(tmp_path / f"{number}" / whole.name)
        shutil.copytree(whole, paths[-1])
        change(paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(whole), *map(str, paths)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = dict(zip(BIG, done.stdout.splitlines(), strict=True))
    assert {name: line for name, line in lines.items() if line == "taken"} == {}

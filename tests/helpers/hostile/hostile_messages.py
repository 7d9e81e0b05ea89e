"""Messages that a queue must refuse, each damaged or hostile in its own way, and one that it takes."""

import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

JOB = {
    "name": "n", "run_dir": "/r", "command": "cat sent.txt", "workers": 1, "most": 1, "cpus": 1, "gpus": 0, "group": 1,
    "priority": 0,
}  # fmt: skip


def submit(id: str = "job-a", **changes: Any) -> dict[str, Any]:
    return {"do": "submit", "id": id, "job": JOB | changes}


def zipped(message: object, files: dict[str, bytes] | None = None, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A message's zip. A dict or list becomes JSON; bytes and str stay."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("message.json", message if isinstance(message, str | bytes) else json.dumps(message))
        archive.writestr("work/", b"")
        for name, content in (files or {}).items():
            archive.writestr(name, content)
    return file.getvalue()


def patched(content: bytes, name: bytes, offset: int, form: str, *values: int, local: bool = False) -> bytes:
    """A zip with changed numbers in a member's header: in the directory, or before the member itself."""
    changed = bytearray(content)
    at = (content.index(name) - 30) if local else (content.rindex(name) - 46)
    struct.pack_into(form, changed, at + offset, *values)
    return bytes(changed)


def member(name: str, mode: int = 0o100644, **changes: Any) -> bytes:
    """A zip with one more member, of this name and mode."""
    file = BytesIO(zipped(submit()))
    with zipfile.ZipFile(file, "a") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        for key, value in changes.items():
            setattr(entry, key, value)
        with warnings.catch_warnings(action="ignore"):  # about a duplicate name
            archive.writestr(entry, b"x")
    return file.getvalue()


def twice(content: bytes) -> bytes:
    """A zip whose directory names all of its members twice."""
    size, start = struct.unpack("<2L", content[-10:-2])
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 4, 4, 2 * size, start, 0)
    return content[:start] + 2 * content[start:-22] + end


def shared_data() -> bytes:
    """Two members that are inflated from the same bytes, as in a zip bomb without recursion."""
    content = zipped(submit(), {"work/a": b"a" * 100, "work/b": b"a" * 100})
    return patched(content, b"work/b", 42, "<L", content.index(b"work/a") - 30)


def zip64(content: bytes) -> bytes:
    size, start = struct.unpack("<2L", content[-10:-2])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(content) - 22, 1)
    return content[:-22] + record + locator + content[-22:]


GOOD = zipped(submit(), {"work/sent.txt": b"as sent"})

_VALUES = {
    "workers": [0, -1, True, 1.0, "1", None, 10**12, 10**30, [1]],
    "most": [0, 10**12, False],
    "cpus": [float("nan"), float("inf"), -1, True, "1", 1e300, 1e-300, None],
    "gpus": [float("nan"), -float("inf"), -0.5, True, {}],
    "group": [0, -8, True, 10**12],
    "priority": [True, 0.5, 10**30, "9", None],
    "name": ["", "a/b", "..", "a\n", "\x1b[2J", "x" * 300, 7],
    "run_dir": ["", "r", "/r\n{\"id\": \"job-b\"}", "/\x1b]52;c;x\7", "/\u202e", "/" + "x" * 5000, 7],
    "command": ["", "true\nfalse", "true\0", "\x1b[2J", "x" * 10**5, 7],
    "state": ["FINISHED"],
    "submitted": [0.0],
}  # fmt: skip

_TEXTS: dict[str, object] = {
    "do a list": {"do": ["submit"]}, "do a mapping": {"do": {}}, "do unknown": {"do": "exec", "id": "job-a"},
    "no mapping": [], "number": "1", "null": "null", "nothing": "", "no JSON": "{", "not UTF-8": b'{"do": "\xff"}',
    "deep": "[" * 10**5, "deep objects": '{"a":' * 10**4, "lone surrogate": '{"do": "stop", "id": "\\ud800"}',
    "digits": '{"do": "stop", "id": "job-a", "now": ' + "9" * 10**5 + "}", "NaN": '{"do": NaN}',
    "long": " " * 10**6, "job a list": {"do": "submit", "id": "job-a", "job": [1]},
    "no job": {"do": "submit", "id": "job-a"}, "now a number": {"do": "stop", "id": "job-a", "now": 1},
    "nothing reserved": submit(cpus=0), "more keys": submit() | {"user": "root"},
    "of the queue itself": submit("muster-queue-2"), "another file": submit("../journal.jsonl"),
    "end of line": submit("job-a\n"), "journal": submit("journal"), "new a path": {"do": "retry", "id": "job-a",
    "new": "job-/../../x"},
}  # fmt: skip

HOSTILE: dict[str, Callable[[], bytes]] = {
    **{f"{key}={str(value)[:20]!r}": lambda key=key, value=value: zipped(submit(**{key: value}))
       for key, values in _VALUES.items() for value in values},
    **{f"text: {name}": lambda text=text: zipped(text) for name, text in _TEXTS.items()},
    "empty": bytes,
    "junk": lambda: b"PK\3\4 no zip at all" * 10,
    "only an end": lambda: struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0),
    "no message": lambda: zipped("{}").replace(b"message.json", b"passage.json"),
    "cut": lambda: GOOD[:-30],
    "cut in front": lambda: GOOD[10:],
    "something in front": lambda: b"#!/bin/sh\n" + GOOD,
    "comment": lambda: GOOD[:-2] + b"\4\0four",
    "comment of a member": lambda: patched(GOOD, b"message.json", 32, "<H", 60000),
    "extra of a member": lambda: patched(GOOD, b"message.json", 30, "<H", 60000),
    "two of each": lambda: twice(GOOD),
    "shared data": shared_data,
    "zip64": lambda: zip64(GOOD),
    "damaged data": lambda: GOOD[:60] + b"\xff" * 4 + GOOD[64:],
    "lzma": lambda: zipped(submit(), method=zipfile.ZIP_LZMA),
    "bzip2": lambda: zipped(submit(), method=zipfile.ZIP_BZIP2),
    "method 99": lambda: patched(GOOD, b"message.json", 10, "<H", 99),
    "stored, says the directory": lambda: patched(GOOD, b"message.json", 10, "<H", 0),
    "encrypted": lambda: patched(GOOD, b"message.json", 8, "<H", 1),
    "another checksum": lambda: patched(GOOD, b"message.json", 16, "<L", 1),
    "more data than there are": lambda: patched(GOOD, b"message.json", 20, "<L", 2**32 - 16),
    "larger than it is": lambda: patched(GOOD, b"message.json", 24, "<L", 10**5),
    "smaller than it is": lambda: patched(GOOD, b"message.json", 24, "<L", 10),
    "elsewhere": lambda: patched(GOOD, b"message.json", 42, "<L", 2**31),
    "another name in front": lambda: patched(GOOD, b"message.json", 30, "<B", 0x7A, local=True),
    "a longer name in front": lambda: patched(GOOD, b"message.json", 26, "<H", 60000, local=True),
    "bad name": lambda: GOOD.replace(b"message.json", b"\xa0essage.json"),
    **{f"file {name!r}": lambda name=name: member(name) for name in (
        "../up", "/etc/up", "work/../../up", "work/../message.json", "work/./x", "work//x", "work\\..\\up", "C:\\up",
        "elsewhere", "work", "message.json/x", "work/" + "x" * 300, "work/" + "x/" * 1000 + "x",
    )},
    "one name twice": lambda: member("work/"),
    "below a file": lambda: zipped(submit(), {"work/a": b"", "work/a/b": b""}),
    "link": lambda: member("work/link", 0o120777),
    "device": lambda: member("work/device", 0o020666),
    "pipe": lambda: member("work/pipe", 0o010666),
    "setuid": lambda: member("work/tool", 0o104755),
    "bomb": lambda: zipped(submit(), {"work/zeros": bytes(101 * 2**20)}),
    "bomb of many": lambda: zipped(submit(), {f"work/{i}": bytes(2**20) for i in range(101)}),
    "bomb of a message": lambda: zipped(b" " * 2**22 + json.dumps(submit()).encode()),
    "many files": lambda: zipped(submit(), {f"work/{i}": b"" for i in range(10_001)}),
    "endless directory": lambda: _directory(200_000),
}  # fmt: skip


def _directory(count: int) -> bytes:
    """As many names as fit into few bytes, in a zip that claims to have two."""
    (start,) = struct.unpack("<L", GOOD[-6:-2])
    entries = GOOD[start : start + 46 + len("message.json")] * count
    return GOOD[:start] + entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(entries), start, 0)

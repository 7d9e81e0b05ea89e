"""Small files that unpack to something far larger, and the cost of reading them in separate processes."""

import gzip
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

MIB = 1 << 20
PROCESSOR_S = 120
"""Seconds after which a process that has not ended is killed."""


class Ended(NamedTuple):
    code: int
    said: str
    peak: int
    """Resident MiB of all processes together."""


def muster(*arguments: object) -> Ended:
    """Run a command line and measure the resources of it and its children; it is killed if it does not end."""
    command = [sys.executable, "-c", "from cluster.cli import main; main()", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said: list[str] = []
        assert process.stdout
        thread = threading.Thread(target=lambda out: said.append(out.read()), args=[process.stdout])
        thread.start()
        parent, seconds = psutil.Process(process.pid), {}
        peak, deadline = 0, time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline and sum(seconds.values()) < PROCESSOR_S:
            resident = 0
            try:
                for each in (parent, *parent.children(recursive=True)):
                    resident += each.memory_info().rss
                    seconds[each.pid] = sum(each.cpu_times()[:2])
            except psutil.Error:  # one that has just ended
                pass
            peak = max(peak, resident)
            time.sleep(0.02)
        process.kill()
        thread.join()
    return Ended(process.returncode, said[0], peak // MIB)


def text_bombs(folder: Path) -> None:
    """Compressed text: one endless line, empty ones, brackets, a long document; each unpacks to 48 MiB."""
    parts = {
        "line.jsonl.zst": b'{"text": "' + b"a" * MIB,
        "blank.jsonl.zst": b"\n" * MIB,
        "empty.jsonl.zst": b"{}\n" * (MIB // 3),
        "lists.jsonl.zst": b'{"a": [' + b"[]," * (MIB // 3),
        "deep.jsonl.gz": b"[" * MIB,
        "text.txt.zst": b"a" * MIB,
    }
    for name, part in parts.items():
        pack = gzip.compress if name.endswith(".gz") else zstandard.compress
        (folder / name).write_bytes(pack(part * 48))


def parquet_bombs(folder: Path) -> None:
    """Parquet: a long text named again and again, by a dictionary or by prefixes; nulls without end; zeros."""

    def write(name: str, values: pa.Array, **options: object) -> None:
        pq.write_table(pa.table({"text": values}), folder / name, compression="zstd", **options)

    def dictionary(text: str, rows: int) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))

    write("dictionary.parquet", dictionary("x" * (8 * MIB), 1 << 14))
    write("empty.parquet", dictionary("", 1 << 20))
    write("nulls.parquet", pa.nulls(1 << 22, pa.string()))
    write("zeros.parquet", pa.array(["\0" * (40 * MIB)]))
    prefixed = pa.array(["y" * MIB + str(i) for i in range(64)])
    write("prefix.parquet", prefixed, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    tell_less(folder / "zeros.parquet", folder / "lying.parquet")


def tell_less(bomb: Path, copy: Path) -> None:
    """Copy a file of one column chunk, with a footer that claims it has 1000 bytes."""
    data = bomb.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    pages, footer = data[:start], data[start:-8]
    true = _number(pq.ParquetFile(bomb).metadata.row_group(0).column(0).total_uncompressed_size)
    assert true in footer
    footer = footer.replace(true, _number(1000))
    copy.write_bytes(pages + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert pq.ParquetFile(copy).metadata.row_group(0).column(0).total_uncompressed_size == 1000


def _number(value: int) -> bytes:
    """As Thrift's compact protocol writes it."""
    value, found = value << 1, b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])

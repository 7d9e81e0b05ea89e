"""Random access to the row groups of one split: checked against the manifest when opened, verified when read."""

from bisect import bisect_right
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import ConfigError
from configs.reading.lfs import refuse_pointer
from configs.reading.parquet_pages import pages
from configs.reading.parse import clip
from configs.sections.data import LimitsConfig
from trainer.data.child import MIB
from trainer.data.manifest import Manifest, Shard, Split
from trainer.data.prepare.shard_writer import COLUMN, schema

OPEN_FILES = 16
EXPANSION = 16
"""Decoded bytes per byte on disk above which memory is limited; tokens of real text have 2 to 6."""
GROUP_FOOTER = 1 << 10
"""Most bytes of a row group in a footer; ours take some 100."""


class DataError(RuntimeError):
    """Data cannot be read, although they were intact when they were prepared.

    Attributes:
        file: the shard.
        row_group: its number in the shard.
        damaged: the file can be read, but its page is not what was written; False: it cannot be read at all.
    """

    def __init__(self, file: Path, row_group: int, reason: str, damaged: bool):
        super().__init__(file, row_group, reason, damaged)
        self.file, self.row_group, self.reason, self.damaged = file, row_group, reason, damaged

    def __str__(self) -> str:
        way_on = " or set data.on_bad_page=skip" if self.damaged else ""
        return (
            f"{self.file}, row group {self.row_group}: {self.reason}.\n"
            f"Restore the file (`muster data inspect FOLDER --verify` checks them all){way_on}"
        )


class Shards:
    """The row groups of one split of a prepared folder, numbered through all shards.

    Not for several threads at once.

    Args:
        folder: the prepared folder.
        manifest: its manifest.
        split: which split.
        cached_groups: decoded row groups in the LRU cache.
        limits: on the memory that they take.

    Raises:
        ConfigError: a shard is missing, or its size, row groups or rows differ from the manifest's; row groups take
            more memory than the limits and their size on disk allow.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, split: Split, cached_groups: int, limits: LimitsConfig):
        self.folder, self.manifest, self.limits = Path(folder), manifest, limits
        self.shards = manifest.of(split)
        self.group_tokens = manifest.prepare.row_group_tokens
        self._schema = schema(manifest.dtype)
        self._ends = list(accumulate(shard.row_groups for shard in self.shards))
        self.groups = self._ends[-1] if self._ends else 0
        self.last_tokens = sum(shard.rows for shard in self.shards) - max(self.groups - 1, 0) * self.group_tokens
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_groups = cached_groups
        self._open: OrderedDict[int, tuple[Any, pq.ParquetFile]] = OrderedDict()
        self._check()

    def locate(self, group: int) -> tuple[Path, int]:
        """The file that holds a row group, and its number there."""
        shard = bisect_right(self._ends, group)
        first = self._ends[shard - 1] if shard else 0
        return self.folder / self.shards[shard].file, group - first

    def tokens(self, group: int) -> np.ndarray:
        """Tokens of a row group, [n] of the manifest's dtype.

        Raises:
            DataError: a bad page (checksum, decoding, count, token out of range), or a file cannot be read.
        """
        if group in self._decoded:
            self._decoded.move_to_end(group)
            return self._decoded[group]
        path, local = self.locate(group)
        try:
            source, file = self._file(bisect_right(self._ends, group))
            self._check_size(source, file, local)
            tokens = file.read_row_group(local, [COLUMN], use_threads=False)[COLUMN].to_numpy()
        except (OSError, ValueError, pa.ArrowException) as error:
            # The operating system's errors have an errno; damage that Parquet finds has none.
            damaged = getattr(error, "errno", None) is None
            raise DataError(path, local, clip(error, 200), damaged) from error
        expected = self.last_tokens if group == self.groups - 1 else self.group_tokens
        # A flipped bit in a page header, which no checksum covers, gives an error or fewer values.
        if len(tokens) != expected:
            raise DataError(path, local, f"{len(tokens)} tokens, but the manifest has {expected}", damaged=True)
        size = self.manifest.tokenizer.vocab_size
        if int(tokens.max()) >= size:
            raise DataError(path, local, f"token {tokens.max()} is outside the vocabulary of {size}", damaged=True)
        self._decoded[group] = tokens
        if len(self._decoded) > self._cached_groups:
            self._decoded.popitem(last=False)
        return tokens

    @staticmethod
    def _check_size(source: Any, file: pq.ParquetFile, group: int) -> None:
        """Raise ValueError if a row group would decompress to more than its tokens, which it stores as 32-bit integers
        (and perhaps once more, in a dictionary)."""
        metadata = file.metadata.row_group(group)
        chunk = metadata.column(0)
        starts = [at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at]
        unpacked = sum(page.unpacked for page in pages(source, min(starts), chunk.total_compressed_size))
        if max(unpacked, chunk.total_uncompressed_size) > 8 * metadata.num_rows + (1 << 16):
            raise ValueError(f"its {metadata.num_rows:,} tokens decompress to {unpacked:,} bytes")

    def _file(self, shard: int) -> tuple[Any, pq.ParquetFile]:
        # Ranged reads, not a memory map: truncating a mapped file would kill the process with SIGBUS.
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            source = pa.OSFile(str(self.folder / self.shards[shard].file))
            self._open[shard] = source, pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
            if len(self._open) > OPEN_FILES:
                source, file = self._open.popitem(last=False)[1]
                file.close()
                source.close()
        return self._open[shard]

    def _check(self) -> None:
        at_once = min(sum(shard.rows for shard in self.shards), self._cached_groups * self.group_tokens)
        size = at_once * np.dtype(self.manifest.dtype).itemsize
        if size > max(self.limits.memory * MIB, EXPANSION * sum(shard.bytes for shard in self.shards)):
            raise ConfigError(
                f"data.path={self.folder}: reading it takes {size / MIB:,.0f} MiB, for row groups of "
                f"{self.group_tokens:,} tokens that take almost no space on disk.\nIf you trust it, prepare it "
                f"again with "
                f"smaller data.prepare.row_group_tokens, or set data.limits.memory={-(-size // MIB)}"
            )
        last = len(self.shards) - 1
        with ThreadPoolExecutor(16) as pool:
            problems = list(pool.map(lambda item: self._problem(item[1], item[0] == last), enumerate(self.shards)))
        found = [problem for problem in problems if problem]
        if found:
            more = f" (and {len(found) - 1} more shards)" if len(found) > 1 else ""
            raise ConfigError(
                f"{found[0]}{more}.\nThe data in {self.folder} have changed since they were prepared: restore "
                f"them or prepare "
                "them again"
            )

    def _problem(self, shard: Shard, is_last: bool) -> str | None:
        path = self.folder / shard.file
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        try:
            refuse_pointer(path)
        except (OSError, ValueError) as error:
            return f"{path} cannot be read: {error}"
        if size != shard.bytes:
            return f"{path} has {size:,} bytes, but the manifest has {shard.bytes:,}"
        try:
            with open(path, "rb") as end:
                end.seek(max(size - 8, 0))
                footer, magic = int.from_bytes(end.read(4), "little"), end.read(4)
            if magic == b"PAR1" and footer > GROUP_FOOTER * (shard.row_groups + 16):
                return f"{path} has a footer of {footer:,} bytes for {shard.row_groups} row groups"
            with pq.ParquetFile(path) as file:
                metadata, found = file.metadata, file.schema_arrow
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            return f"{path} is not a Parquet file: {clip(error, 200)}"
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if sum(rows) != shard.rows:
            return f"{path} has {sum(rows):,} rows, but the manifest has {shard.rows:,}"
        if len(rows) != shard.row_groups:
            return f"{path} has {len(rows)} row groups, but the manifest has {shard.row_groups}"
        if any(count != self.group_tokens for count in (rows[:-1] if is_last else rows)):
            return f"{path} has row groups of a different size than the manifest's {self.group_tokens:,} rows"
        if not found.equals(self._schema):
            return f"{path} has columns {found.names} of {found.types}, not {COLUMN} of {self.manifest.dtype}"
        return None

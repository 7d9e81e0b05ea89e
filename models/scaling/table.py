"""The input of a fit: one row per finished run, with its size, tokens, FLOPs and loss."""

import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs import ConfigError, counted
from configs.reading.lfs import refuse_pointer
from configs.reading.parse import is_file, shortened

from .forms.dense import Array

CONVENTIONS = ("total", "active", "without_embeddings", "with_head")
"""Ways to count N: all parameters; active ones; active without embedding and head; active without the embedding."""
REQUIRED = ("n", "d", "c", "loss")
MAX_TABLE_BYTES, MAX_TABLE_ROWS, MAX_TABLE_COLUMNS, LONGEST_TEXT = 16 * 1024**2, 50_000, 1_000, 1_000
"""Limits of a table that is read; a fit's bootstrap holds a thousand numbers for each row."""
MAX_TABLE_CELLS = 2_000_000
MAX_UNPACKED = 8 * MAX_TABLE_CELLS + MAX_TABLE_BYTES
"""Most bytes that the pages of a Parquet file may decompress to: as many numbers, and as much text as in a CSV file."""
GAPS, SHARED = (0.1, 0.3, 0.6), 0.75
"""Relative gaps in FLOPs that may separate budgets, and the share of runs in common budgets that makes them so."""
NONE = ("", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "None", "NaN", "nan", "-")
"""Cells that hold no number."""
LONGEST_LINE = 1024**2
"""Bytes: a thousand columns of LONGEST_TEXT."""
ALLOWED: Mapping[str, Callable[[Array], NDArray[np.bool_]]] = {
    "experts": lambda x: np.isfinite(x) & (x >= 1) & (x == np.floor(x)),
    "top_k": lambda x: np.isfinite(x) & (x >= 1) & (x == np.floor(x)),
    "granularity": lambda x: np.isfinite(x) & (x > 0),
    "active_ratio": lambda x: (x > 0) & (x <= 1),
    "unique": lambda x: np.isnan(x) | (x > 0),
}
"""Which values of PROPERTIES a model can have."""
PROPERTIES = tuple(ALLOWED)
KNOWN = (*REQUIRED, "run", "recipe", *PROPERTIES, *CONVENTIONS)
"""Columns that a table of runs may have."""


@dataclass(frozen=True)
class Table:
    """Finished runs, a row each; arrays have shape (rows,)."""

    n: Array
    """Parameters, counted as `convention` says."""
    d: Array
    """Training tokens."""
    c: Array
    """Training FLOPs."""
    loss: Array
    """Held-out loss, nats per token."""
    convention: str = "given"
    """One of CONVENTIONS; "given": a column of a file, whose convention only its author knows."""
    counts: Mapping[str, Array] = field(default_factory=dict)
    """N in every convention that is known."""
    extra: Mapping[str, Array] = field(default_factory=dict)
    """PROPERTIES that are known: experts (1: dense), top_k, granularity, active_ratio, unique (tokens; nan: none are
    repeated)."""
    run: tuple[str, ...] = ()
    """The run of each row, the unit of the bootstrap."""
    recipe: tuple[str, ...] = ()
    """What must be equal for losses to be comparable; rows of different recipes are not fitted together."""
    excluded: tuple[tuple[str, str], ...] = ()
    """(run, why) of what was left out."""
    notes: tuple[str, ...] = ()
    """What was assumed."""

    def __post_init__(self) -> None:
        rows = len(self.n)
        if not self.run:
            object.__setattr__(self, "run", tuple(f"row {i + 1}" for i in range(rows)))
        if not self.recipe:
            object.__setattr__(self, "recipe", ("",) * rows)
        arrays = (*self.counts.values(), *self.extra.values(), self.d, self.c, self.loss)
        assert {len(array) for array in arrays} | {len(self.run), len(self.recipe)} == {rows}

    def __len__(self) -> int:
        return len(self.n)

    @property
    def columns(self) -> dict[str, Array]:
        """Columns by name, as the forms need them."""
        return {"n": self.n, "d": self.d, "c": self.c, **self.extra}

    def take(self, rows: NDArray[Any]) -> "Table":
        """Some rows, by index or mask."""
        index = np.arange(len(self))[rows]
        return replace(
            self,
            n=self.n[index], d=self.d[index], c=self.c[index], loss=self.loss[index],
            counts={key: values[index] for key, values in self.counts.items()},
            extra={key: values[index] for key, values in self.extra.items()},
            run=tuple(self.run[i] for i in index), recipe=tuple(self.recipe[i] for i in index),
        )  # fmt: skip

    def counted_as(self, convention: str) -> "Table":
        """The same runs with N counted another way. Raises ConfigError if that is not known."""
        if convention == self.convention:
            return self
        if convention not in self.counts:
            raise ConfigError(f"--convention {convention}: this table has {', '.join(self.counts) or 'one N only'}")
        return replace(self, n=self.counts[convention], convention=convention)

    def up_to(self, budget: float) -> "Table":
        """The runs of at most so many FLOPs, with 1% of tolerance. Raises ConfigError if there are none."""
        over = self.c > 1.01 * budget
        if over.all():
            raise ConfigError(
                f"--max-budget {budget:g} leaves no run: the smallest one spends {self.c.min():.3g} FLOPs"
            )
        return self.without(over, f"over --max-budget {budget:g}")

    def without(self, wrong: NDArray[np.bool_], why: str | Callable[[int], str]) -> "Table":
        """Leave rows out, and note the reason."""
        if not wrong.any():
            return self
        reasons = [(self.run[i], why if isinstance(why, str) else why(i)) for i in np.flatnonzero(wrong).tolist()]
        return replace(self.take(~wrong), excluded=(*self.excluded, *reasons))


class Budgets(NamedTuple):
    """The budget of each row."""

    level: NDArray[np.int64]
    """From 0 (the smallest), shape (rows,)."""
    common: bool
    """Whether runs share budgets; if not, each "budget" is an octave of FLOPs."""


def budgets(table: Table) -> Budgets:
    """The budgets of a table's runs: clusters of FLOPs with gaps between them, else octaves.

    Trials miss their budget somewhat (whole steps, sizes of whole heads), so that several widths of a gap are tried;
    that of the most runs in clusters of two or more wins. A cluster's own spread is at most half of the gaps beside it:
    runs at random FLOPs chain into clusters, too.
    """
    if not len(table):
        return Budgets(np.empty(0, dtype=np.int64), False)
    log_c = np.log(table.c)
    order = np.argsort(log_c, kind="stable")
    steps = np.diff(log_c[order])
    found: list[tuple[float, NDArray[np.int64]]] = []
    for tolerance in GAPS:
        cuts = np.flatnonzero(steps > np.log1p(tolerance))
        first, last = np.append(0, cuts + 1), np.append(cuts, len(order) - 1)
        gaps = np.concatenate([[np.inf], steps[cuts], [np.inf]])
        spread = log_c[order[last]] - log_c[order[first]]
        tight = (first < last) & (spread < np.log(2)) & (2 * spread <= np.minimum(gaps[:-1], gaps[1:]))
        index = np.empty(len(table), dtype=np.int64)
        index[order] = np.repeat(np.arange(len(first)), last - first + 1)
        found.append((float(tight[index].mean()), index))
    shared, index = max(found, key=lambda each: each[0])
    if shared >= SHARED:
        return Budgets(index, True)
    octave = np.floor((log_c - log_c.min()) / np.log(2) + 1e-6)
    return Budgets(np.unique(octave, return_inverse=True)[1], False)


def resampled(table: Table, count: int, generator: np.random.Generator) -> Array:
    """How often each row was drawn, shape (count, rows): runs are drawn with replacement, with all their rows."""
    _, run = np.unique(np.array(table.run), return_inverse=True)
    runs = int(run.max()) + 1
    return generator.multinomial(runs, np.full(runs, 1 / runs), size=count)[:, run].astype(float)


def read_table(
    path: str | Path, columns: Mapping[str, str] | None = None, where: Mapping[str, Any] | None = None
) -> Table:
    """A table of runs from a CSV file (also .csv.gz; commas, semicolons or tabs between cells) or a Parquet file.

    Args:
        columns: {our name: the file's}, for any of n, d, c, loss, run, recipe, experts, top_k, granularity,
            active_ratio, unique and the conventions of N; others are looked for under our name.
        where: {column of the file: the value that rows must have, or several, separated by commas}; "": an empty cell.
            Spaces around names and values are ignored.

    Without c it is 6 n d; without d it is c / (6 n); both are noted.

    Raises:
        ConfigError: no such file or column, or a column has cells that are not numbers.
    """
    asked = [
        *(columns.values() if isinstance(columns, Mapping) else ()),
        *(where if isinstance(where, Mapping) else ()),
    ]
    wanted = {*KNOWN, *(str(name).strip() for name in asked)}
    return table_of_columns(_read(Path(path), wanted), path, columns, where)


def table_of_columns(
    table: Any,
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, Any] | None = None,
) -> Table:
    """As `read_table`, for an Arrow table; messages name `path` as where it comes from."""
    data = [name.strip() for name in table.column_names]
    if twice := next((name for name, times in Counter(data).items() if times > 1), None):
        raise ConfigError(f"{path}: two columns have the name {shortened(twice)}")
    table = table.rename_columns(data)
    for option, given in (("--columns", columns), ("--where", where)):
        if not isinstance(given, Mapping | None):
            raise ConfigError(f"{option} {shortened(given)}: should be column names with their values")
    columns = {str(ours).strip(): str(theirs).strip() for ours, theirs in (columns or {}).items()}
    where = {str(name).strip(): "" if value is None else str(value) for name, value in (where or {}).items()}
    for ours, theirs in columns.items():
        if ours not in KNOWN:
            raise ConfigError(f"--columns {ours}={theirs}: no such column; known are {', '.join(KNOWN)}")
        if theirs not in data:
            raise ConfigError(f"--columns {ours}={theirs}: {path} has {shortened(', '.join(data), 300)}")
    keep = np.ones(table.num_rows, dtype=bool)
    for name, value in where.items():
        if name not in data:
            raise ConfigError(f"--where {name}={value}: {path} has {shortened(', '.join(data), 300)}")
        keep &= np.array(
            [any(_same(cell, each) for each in value.split(",")) for cell in table.column(name).to_pylist()], dtype=bool
        )
    if not keep.any():
        raise ConfigError(f"{path}: no rows are left" + (f" where {where}" if where else ""))
    kept, in_file = table.filter(keep), (np.flatnonzero(keep) + 1).tolist()
    taken = {name: columns.get(name, name) for name in KNOWN}
    found = {ours: kept.column(theirs).to_pylist() for ours, theirs in taken.items() if theirs in data}
    notes = []
    missing = [name for name in ("n", "loss") if name not in found]
    if missing or ("c" not in found and "d" not in found):
        wanted = missing or ["d"]
        raise ConfigError(
            f"{path} has no column {' and '.join(wanted)}: name it, such as --columns "
            f"{','.join(f'{name}=...' for name in wanted)}; the file has {shortened(', '.join(data), 300)}"
        )
    numbers = {
        name: _numbers(cells, taken[name], in_file, path)
        for name, cells in found.items() if name not in ("run", "recipe")
    }  # fmt: skip
    if "c" not in numbers:
        numbers["c"] = 6 * numbers["n"] * numbers["d"]
        notes.append("c is 6 n d, as the table has no column of FLOPs")
    if "d" not in numbers:
        numbers["d"] = numbers["c"] / (6 * numbers["n"])
        notes.append("d is c / (6 n), as the table has no column of tokens")
    extra, dense = _dense({name: numbers[name] for name in PROPERTIES if name in numbers})
    rows = len(numbers["n"])
    runs = Table(
        n=numbers["n"],
        d=numbers["d"],
        c=numbers["c"],
        loss=numbers["loss"],
        counts={name: numbers[name] for name in CONVENTIONS if name in numbers},
        extra=extra,
        run=tuple(_text(cell) or f"row {i}" for cell, i in zip(found.get("run", rows * [None]), in_file, strict=True)),
        recipe=tuple(_text(cell) for cell in found.get("recipe", rows * [None])),
        notes=(*notes, *dense),
    )
    return usable(runs)


def usable(table: Table) -> Table:
    """The table without rows that have no logarithm, or properties that no model can have.

    Raises:
        ConfigError: no row is left.
    """
    values = {name: getattr(table, name) for name in REQUIRED} | dict(table.extra)
    right = {name: np.isfinite(values[name]) & (values[name] > 0) for name in REQUIRED}
    for name, column in table.extra.items():
        with np.errstate(invalid="ignore"):
            right[name] = ALLOWED[name](column)

    def why(i: int) -> str:
        return ", ".join(f"{name}={values[name][i]:g}" for name, good in right.items() if not good[i])

    left = table.without(~np.all(list(right.values()), axis=0), why)
    if len(table) and not len(left):
        run, reason = left.excluded[-len(table)]
        raise ConfigError(f"no row can be used: {len(table)} rejected, such as {run}: {reason}")
    return left


def _dense(extra: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Properties with 1 for a dense model's experts, and for its other properties if empty; and notes that say so."""
    if "experts" not in extra:
        return dict(extra), ()
    experts = extra["experts"]
    none = np.isnan(experts) | (experts == 0)
    for name in ("top_k", "active_ratio"):  # a row that is a MoE by one of these stays one
        if name in extra:
            none &= np.isnan(extra[name]) | (extra[name] == 1)
    found, filled = {**extra, "experts": np.where(none, 1.0, experts)}, []
    for name in ("top_k", "granularity", "active_ratio"):
        if name in extra and (empty := (found["experts"] == 1) & np.isnan(extra[name])).any():
            found[name] = np.where(empty, 1.0, extra[name])
            filled.append(name)
    notes = (
        [f"{counted(int(none.sum()), 'row')} with experts empty or 0: treated as dense, experts=1"]
        if none.any()
        else []
    )
    notes += [f"{name} is set to 1 where it is empty and the model is dense" for name in filled]
    return found, tuple(notes)


def _read(path: Path, wanted: Set[str]) -> Any:
    """A file as an Arrow table of numbers and short texts; ConfigError if a column that is wanted has neither."""
    if not is_file(path):
        raise ConfigError(f"--table {shortened(str(path), 200)}: no such file")
    import pyarrow as pa  # a laptop's `muster --help` does without it

    try:
        refuse_pointer(path)
        return _parquet(path, wanted) if path.suffix == ".parquet" else _csv(path)
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = shortened(str(error).partition("\n")[0], 200)
        if "straddling" in why:
            why = f"a line is longer than {LONGEST_LINE:,} bytes"
        raise ConfigError(f"--table {path}: neither CSV nor Parquet: {why}") from None
    except ValueError as error:
        raise ConfigError(f"--table {path}: {error}") from None


def _check_size(names: Sequence[str], rows: int) -> None:
    """Raise ValueError if a table has two columns of one name, or too many rows, columns or cells."""
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise ValueError(f"two columns have the name {shortened(twice)}")
    if rows > MAX_TABLE_ROWS:
        raise ValueError(f"it has over {MAX_TABLE_ROWS:,} rows")
    if len(names) > MAX_TABLE_COLUMNS:
        raise ValueError(f"it has over {MAX_TABLE_COLUMNS:,} columns")
    if rows * len(names) > MAX_TABLE_CELLS:
        raise ValueError(f"it has {rows:,} rows of {len(names):,} columns, over {MAX_TABLE_CELLS:,} cells")


def _csv(path: Path) -> Any:
    import pyarrow.csv as csv

    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read(MAX_TABLE_BYTES + 1)
    if len(content) > MAX_TABLE_BYTES:
        raise ValueError(f"it has over {MAX_TABLE_BYTES:,} bytes")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16 text: save it as UTF-8")
    header = re.split(rb"[\r\n]", content, maxsplit=1)[0]
    between = next((mark for mark in (b",", b";", b"\t") if mark in header), b",")
    if header.count(between) >= MAX_TABLE_COLUMNS:
        raise ValueError(f"it has over {MAX_TABLE_COLUMNS:,} columns")
    # A line ends in \n, \r or both.
    if max(content.count(b"\n"), content.count(b"\r")) > MAX_TABLE_ROWS + 1:
        raise ValueError(f"it has over {MAX_TABLE_ROWS:,} rows")
    if content.count(between) > MAX_TABLE_CELLS:
        raise ValueError(f"it has over {MAX_TABLE_CELLS:,} cells")
    found = csv.read_csv(
        io.BytesIO(content), csv.ReadOptions(block_size=LONGEST_LINE), csv.ParseOptions(delimiter=between.decode())
    )
    _check_size(found.column_names, found.num_rows)
    return found


def _parquet(path: Path, wanted: Set[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with pa.OSFile(str(path)) as source:
        file = parquet.ParquetFile(source)
        schema = file.schema_arrow
        _check_size(schema.names, file.metadata.num_rows)
        is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary)
        is_number = (pa.types.is_primitive, pa.types.is_decimal, pa.types.is_null)
        texts = [field.name for field in schema if any(kind(field.type) for kind in is_text)]
        names = [field.name for field in schema if field.name in texts or any(kind(field.type) for kind in is_number)]
        if unread := [field for field in schema if field.name.strip() in wanted and field.name not in names]:
            raise ValueError(
                f"column {shortened(unread[0].name)} is of type {shortened(unread[0].type)}, neither numbers nor text"
            )
        _check_unpacked(file.metadata, source, names)
        # Texts stay dictionary-encoded, as in the file: every row may have the same long text.
        found = parquet.ParquetFile(source, read_dictionary=texts).read(columns=names)
    for name in texts:
        for chunk in found.column(name).chunks:
            if any(len(text.as_py() or "") > LONGEST_TEXT for text in getattr(chunk, "dictionary", chunk)):
                raise ValueError(f"column {name} has texts of over {LONGEST_TEXT:,} characters")
    _check_size(found.column_names, found.num_rows)
    return found


def _check_unpacked(metadata: Any, source: Any, names: Sequence[str]) -> None:
    """Raise ValueError if pages decompress to more than `MAX_UNPACKED`, whatever the footer says of them."""
    from configs.reading.parquet_pages import pages

    unpacked = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(metadata.num_columns)):
            if chunk.path_in_schema not in names:
                continue
            start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            found = pages(source, start, chunk.total_compressed_size)
            unpacked += max(chunk.total_uncompressed_size, sum(page.unpacked for page in found))
            if unpacked > MAX_UNPACKED:
                raise ValueError(f"its pages decompress to over {MAX_UNPACKED:,} bytes")


def _text(cell: Any) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()


def _same(cell: Any, value: str) -> bool:
    if not value.strip() or cell is None:
        return _text(cell) == value.strip()
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        try:
            return float(cell) == float(value)
        except ValueError:
            return False
    return _text(cell) == value.strip()


def _numbers(cells: Sequence[Any], column: str, rows: Sequence[int], path: str | Path) -> Array:
    numbers = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        if cell is None or (isinstance(cell, str) and cell.strip() in NONE):
            continue
        try:
            numbers[i] = float(cell)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"{path}: row {rows[i]} of column {column} contains {shortened(repr(cell), 100)}, which is not a number"
            ) from None
    return numbers

"""Turns images in class folders, and rows and pairs in CSV, into Parquet with a split of their own."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

from configs import ConfigError, counted
from configs.reading.parse import clip, shortened
from trainer.data.manifest import Split
from trainer.data.parquet_files import held_out_rows
from trainer.data.read.order import mix, shuffled
from trainer.data.sources.find import find_inputs
from trainer.files.durable import fsync

How = Literal["random", "stratified", "grouped"]
"""random: any rows. stratified: the share of every class. grouped: whole groups of rows."""
FILES: dict[Split, str] = {"train": "train.parquet", "held_out": "validation.parquet"}
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")
MOST_PIXELS = 1 << 26
"""Of an image; training refuses larger ones."""
GROUP_ROWS = {"images": 100, "rows": 1 << 16}
"""Rows of a row group; `datasets` writes 100 images."""
NO_ROWS = "the files have no rows that can be used"
MOST_BYTES = 4 << 30
"""Most bytes of all CSV files, which are read into memory."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Made(NamedTuple):
    """What was written."""

    kind: str
    sizes: dict[Split, int]
    """Rows of each split."""
    classes: list[str]
    """Names of the classes, in the order of their numbers; empty: the labels were numbers already."""
    left_out: str
    """What was not taken, and why; empty: nothing."""

    def __str__(self) -> str:
        lines = [f"{self.sizes['train']:,} {self.kind} to train on, {self.sizes['held_out']:,} held out"]
        if self.classes:
            named = ", ".join(f"{number} {name}" for number, name in enumerate(self.classes))
            lines.append(f"{len(self.classes)} classes: {shortened(named, 500)}")
        return "\n".join([*lines, *filter(None, [self.left_out])])


def split_rows(how: How, share: float, seed: int, of: np.ndarray) -> np.ndarray:
    """Which rows are held out: bool [rows], a function of the arguments alone.

    Args:
        of: [rows] the class (stratified) or the group (grouped) of each row, as whole numbers from 0.
    """
    if how == "random":
        return held_out_rows(len(of), share, seed)
    held_out = np.zeros(len(of), bool)
    sizes = np.bincount(of)
    if how == "stratified":
        for each in np.flatnonzero(sizes):
            held_out[of == each] = held_out_rows(int(sizes[each]), share, mix(seed, int(each)))
        return held_out
    order = shuffled(len(sizes), mix("groups", seed))
    sums = np.concatenate([[0], sizes[order].cumsum()])
    taken = int(np.abs(sums - share * len(of)).argmin())  # as near to the share as whole groups come
    return np.isin(of, order[:taken])


def prepare_images(inputs: Sequence[str], out: Path, how: How, share: float, seed: int, strict: bool = False) -> Made:
    """Images of a folder for each class, which has the folder's name; classes are numbered in the order of the names.

    Args:
        strict: fail on a file that is no PNG or JPEG instead of leaving it out.

    Raises:
        ConfigError: not one folder, it has no folders with images, or the split is empty or has no meaning.
    """
    if len(inputs) != 1 or not Path(inputs[0]).is_dir():
        raise ConfigError("--kind images takes one folder, with a subfolder of images for each class")
    if how == "grouped":
        raise ConfigError(
            "--split grouped takes its groups from a column, which images do not have: choose another split"
        )
    root = Path(inputs[0])
    found: list[tuple[Path, str]] = []
    wrong: list[tuple[Path, str]] = []
    folders = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    for folder in folders:
        for path in sorted(each for each in folder.rglob("*") if each.is_file() and not each.name.startswith(".")):
            (found if path.suffix.lower() in SUFFIXES and _is_image(path) else wrong).append((path, folder.name))
    if not found:
        raise ConfigError(f"{root} has no subfolders with PNG or JPEG images: it needs one for each class")
    left_out = ""
    if wrong:
        left_out = f"{counted(len(wrong), 'file')} left out, not readable as PNG or JPEG: the first is {wrong[0][0]}"
        if strict:
            raise ConfigError(f"{left_out}: correct them, or leave out --strict")
    classes = sorted({name for _, name in found})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for _, name in found])
    held_out = checked_split(split_rows(how, share, seed, labels), share)
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    schema = schema_of([("image", IMAGE), ("label", pa.int64())], features)

    def tables(rows: np.ndarray) -> Iterator[pa.Table]:
        for start in range(0, len(rows), size := GROUP_ROWS["images"]):
            part = rows[start : start + size].tolist()
            paths = [found[row][0] for row in part]
            images = [{"bytes": path.read_bytes(), "path": path.relative_to(root).as_posix()} for path in paths]
            yield pa.table([pa.array(images, IMAGE), pa.array(labels[part], pa.int64())], schema=schema)

    return Made("images", write_splits(out, schema, tables, held_out, seed), classes, left_out)


def _is_image(path: Path) -> bool:
    """Whether all of it can be decoded: training would find out otherwise."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height <= MOST_PIXELS:
                image.load()
                return True
            return False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def prepare_rows(
    inputs: Sequence[str],
    out: Path,
    how: How,
    share: float,
    seed: int,
    labels: Sequence[str] = ("label",),
    group: str | None = None,
    leave_out: Sequence[str] = (),
) -> Made:
    """Rows of CSV or TSV files with the same columns. A label of texts becomes classes, in the order of the texts.

    Args:
        labels: columns that are to be predicted.
        group: with the split `grouped`, the column whose rows of one value stay together; it is not a feature.
        leave_out: further columns that are not features.

    Raises:
        ConfigError: files that are not such, a column is missing or holds no numbers, or the split is empty or has no
            meaning.
    """
    if (how == "grouped") != (group is not None):
        raise ConfigError("--split grouped needs --group COLUMN, and --group needs --split grouped")
    table = read_tables(inputs)
    if not table.num_rows:
        raise ConfigError(NO_ROWS)
    for option, columns in (("--label", labels), ("--group", [group] if group else []), ("--leave-out", leave_out)):
        if missing := [each for each in columns if each not in table.column_names]:
            there = shortened(", ".join(table.column_names), 200)
            raise ConfigError(f"{option} {missing[0]}: the files have no such column (they have {there})")
    groups = table[group] if group else None
    table = table.drop_columns([*leave_out, *([group] if group and group not in leave_out else [])])
    classes: list[str] = []
    if len(labels) == 1 and pa.types.is_string(table.schema.field(labels[0]).type):
        texts = table[labels[0]].to_pylist()
        classes = sorted({each for each in texts if each})  # an empty one is none
        numbers = {name: number for number, name in enumerate(classes)}
        numbered = pa.array([numbers.get(each) for each in texts], pa.int64())
        table = table.set_column(table.column_names.index(labels[0]), labels[0], numbered)
    for field in table.schema:
        kind = field.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise ConfigError(f"column {field.name} is {kind}, not numbers: leave it out with --leave-out {field.name}")
    held_out = checked_split(split_rows(how, share, seed, _of(how, table, labels, groups)), share)
    kinds = {field.name: str(field.type).replace("double", "float64") for field in table.schema}
    features: dict[str, Any] = {name: {"dtype": kind, "_type": "Value"} for name, kind in kinds.items()}
    if classes:
        features[labels[0]] = {"names": classes, "_type": "ClassLabel"}
    schema = schema_of([(field.name, field.type) for field in table.schema], features)
    table = table.cast(schema)

    def tables(rows: np.ndarray) -> Iterator[pa.Table]:
        for start in range(0, len(rows), size := GROUP_ROWS["rows"]):
            yield table.take(pa.array(rows[start : start + size]))

    return Made("rows", write_splits(out, schema, tables, held_out, seed), classes, "")


def prepare_pairs(
    inputs: Sequence[str],
    out: Path,
    how: How,
    share: float,
    seed: int,
    columns: tuple[str, str] = ("source", "target"),
    group: str | None = None,
    strict: bool = False,
) -> Made:
    """Pairs of texts in CSV or TSV files with the same columns, as the columns `source` and `target`.

    Args:
        columns: those of the source and of the target.
        group: with the split `grouped`, the column whose pairs of one value stay together, such as the source.
        strict: fail on a pair that lacks a text instead of leaving it out.

    Raises:
        ConfigError: files that are not such, a column is missing, or the split is empty or has no meaning.
    """
    if how == "stratified":
        raise ConfigError("--split stratified needs classes, which pairs have not: choose random or grouped")
    if (how == "grouped") != (group is not None):
        raise ConfigError("--split grouped needs --group COLUMN, and --group needs --split grouped")
    table = read_tables(inputs, "pairs")
    for option, name in zip(("--source", "--target", "--group"), (*columns, group or columns[0]), strict=True):
        if name not in table.column_names:
            there = shortened(", ".join(table.column_names), 200)
            raise ConfigError(f"{option} {name}: the files have no such column (they have {there})")
    texts = [[each or "" for each in table[name].to_pylist()] for name in columns]
    whole = np.array([bool(source.strip() and target.strip()) for source, target in zip(*texts, strict=True)], bool)
    left_out = ""
    if not whole.all():
        left_out = (
            f"{counted(int((~whole).sum()), 'pair')} left out, a text is empty: the first is row {whole.argmin()}"
        )
        if strict:
            raise ConfigError(f"{left_out}: correct them, or leave out --strict")
    table = table.filter(pa.array(whole))
    groups = table[group].combine_chunks() if group else None
    of = np.zeros(len(table), np.int64)
    if groups is not None:
        of = groups.dictionary_encode("encode").indices.to_numpy().astype(np.int64)
    held_out = checked_split(split_rows(how, share, seed, of), share)
    names = ["source", "target"]
    schema = schema_of(
        [(name, pa.string()) for name in names], {n: {"dtype": "string", "_type": "Value"} for n in names}
    )
    table = table.select(list(columns)).rename_columns(names).cast(schema)

    def tables(rows: np.ndarray) -> Iterator[pa.Table]:
        for start in range(0, len(rows), size := GROUP_ROWS["rows"]):
            yield table.take(pa.array(rows[start : start + size]))

    return Made("pairs", write_splits(out, schema, tables, held_out, seed), [], left_out)


def _of(how: How, table: pa.Table, labels: Sequence[str], groups: pa.ChunkedArray | None) -> np.ndarray:
    """See `split_rows`."""
    if groups is None and how == "random":
        return np.zeros(table.num_rows, np.int64)
    if groups is None:
        if len(labels) > 1 or not pa.types.is_integer(table.schema.field(labels[0]).type):
            raise ConfigError("--split stratified needs a single label, of whole numbers or strings: choose random")
        groups = table[labels[0]]
    return groups.combine_chunks().dictionary_encode("encode").indices.to_numpy().astype(np.int64)


def read_tables(inputs: Sequence[str], kind: str = "rows") -> pa.Table:
    """All rows of some files with the same columns. Of pairs all columns are text, and a TSV has no quotes."""
    files = find_inputs(inputs)
    if wrong := next((file for file in files if file.kind not in ("csv", "tsv") or file.compression), None):
        raise ConfigError(f"{wrong.path} is not a .csv or .tsv file, which --kind {kind} takes, uncompressed")
    if (size := sum(file.bytes for file in files)) > MOST_BYTES:
        raise ConfigError(f"the files have {size:,} bytes, over {MOST_BYTES:,}: write Parquet, which is read as it is")
    tables: list[pa.Table] = []
    for file in files:
        quote = False if kind == "pairs" and file.kind == "tsv" else '"'
        options = pa.csv.ParseOptions(
            delimiter="\t" if file.kind == "tsv" else ",", quote_char=quote, newlines_in_values=kind == "pairs"
        )
        try:
            convert = pa.csv.ConvertOptions()
            if kind == "pairs":
                with pa.csv.open_csv(file.path, pa.csv.ReadOptions(use_threads=False), options) as opened:
                    convert.column_types = dict.fromkeys(opened.schema.names, pa.string())
            read = pa.csv.read_csv(file.path, pa.csv.ReadOptions(use_threads=False), options, convert)
            if len(set(read.column_names)) < read.num_columns:
                raise ValueError("two columns have the same name")
            if tables and read.column_names != tables[0].column_names:
                raise ValueError(f"its columns differ from those of {files[0].path}")
            tables.append(read)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"{file.path} cannot be read as {file.kind.upper()}: {clip(error, 200)}") from None
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(f"the files have columns of different types: {clip(error, 200)}") from None


def schema_of(fields: list[tuple[str, pa.DataType]], features: dict[str, Any]) -> pa.Schema:
    """With the features as `datasets` keeps them: it shows the classes by name."""
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def checked_split(held_out: np.ndarray, share: float) -> np.ndarray:
    """Raise ConfigError if a split is empty."""
    if not len(held_out):
        raise ConfigError(NO_ROWS)
    if held_out.all() or (share and not held_out.any()):
        what = "train on" if held_out.all() else "hold out"
        raise ConfigError(f"--held-out {share:g} of {len(held_out):,} leaves nothing to {what}: choose another share")
    return held_out


def write_splits(
    out: Path, schema: pa.Schema, tables: Callable[[np.ndarray], Iterator[pa.Table]], held_out: np.ndarray, seed: int
) -> dict[Split, int]:
    """Write both splits, a row group for each of `tables(row numbers)`. Returns the rows of each.

    Rows are shuffled: inputs are often sorted by class, and training mixes only some row groups at a time.
    """
    order = shuffled(len(held_out), mix("written", seed))
    rows: dict[Split, np.ndarray] = {"train": order[~held_out[order]], "held_out": order[held_out[order]]}
    with _folder(out) as part:
        for split, numbers in rows.items():
            if len(numbers):
                path = part / FILES[split]
                with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
                    for table in tables(numbers):
                        writer.write_table(table)
                fsync(path)
    return {split: len(numbers) for split, numbers in rows.items()}


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end of the block. Raises ConfigError if there is something, or it cannot
    be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} already exists: choose another folder, or remove it")
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True)
        yield part
        fsync(part)
        os.replace(part, out)
        fsync(out.parent)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"--out {out}: {error.filename or out}: {why}: choose a folder where you can write") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)

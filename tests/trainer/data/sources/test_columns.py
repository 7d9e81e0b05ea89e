"""Text in Parquet files as other tools write it: views, dictionaries, extensions, structs, lists, repeated names."""

import base64
from pathlib import Path

import data_inputs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from trainer.data.child import MIB
from trainer.data.sources.parquet import ParquetProcess, Row

TEXTS = ["a text", "", "für 数据 🙂 " * 20, None, "b"]
DATA = [None if text is None else text.encode() for text in TEXTS]


@pytest.fixture(scope="module")
def process():
    process = ParquetProcess()
    yield process
    process.close()


@pytest.fixture
def read(process, tmp_path: Path):
    def read(table: pa.Table, key: str = "text", **options) -> tuple[list[bytes | None], list[Row]]:
        """(values, refusals other than those of a null value)."""
        pq.write_table(table, tmp_path / "x.parquet", **options)
        rows = list(process.rows(str(tmp_path / "x.parquet"), key, 1 << 24, 1 << 26, 128 * MIB, 1))
        bad = [row for row in rows if row.data is None and row.detail != "null"]
        return [row.data for row in rows if row not in bad], bad

    return read


KINDS = {
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary_view": pa.array(DATA, pa.binary_view()),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "binary": pa.array(DATA, pa.binary()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of large": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "json": pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(TEXTS)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}, {"store_schema": False}])
def test_every_kind_of_string(read, kind: str, options: dict):
    assert read(pa.table({"text": KINDS[kind]}), **options) == (DATA, [])


def test_texts_of_fixed_size(read):
    assert read(pa.table({"text": pa.array([b"abc", b"def"], pa.binary(3))})) == ([b"abc", b"def"], [])


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string_view())])
def test_a_list_of_texts_is_one_document(read, kind: pa.DataType):
    lists = [["a", "b"], None, ["c", None], ["für", ""]]
    assert read(pa.table({"text": pa.array(lists, kind)})) == ([b"a\nb", None, b"c", "für\n".encode()], [])


def test_empty_items_of_a_list_are_skipped(read):
    assert read(pa.table({"text": [[["d"], [], None], [["a", ""], ["b"]], [[None]], []]})) == (
        [b"d", b"a\n\nb", b"", b""], []
    )  # fmt: skip


def test_padding_is_not_text(read):
    assert read(pa.table({"text": pa.array([b"abc" + b"\0" * 17, None], pa.binary(20))})) == ([b"abc", None], [])


def test_ids_are_not_text(read):
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"abcdefghijklmnop"], pa.binary(16)))
    for column in (ids, pa.ListArray.from_arrays([0, 1], ids)):
        values, [bad] = read(pa.table({"text": column}))
        assert (values, bad.reason) == ([], "not text")


class PlainKeys(encryption.KmsClient):
    def wrap_key(self, key_bytes, master_key_identifier):
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key, master_key_identifier):
        return base64.b64decode(wrapped_key)


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_encrypted_columns_are_reported_as_encrypted(tmp_path, plaintext_footer):
    factory, table = encryption.CryptoFactory(lambda config: PlainKeys()), pa.table({"text": ["a"], "id": [1]})
    config = encryption.EncryptionConfiguration("f", column_keys={"c": ["text"]}, plaintext_footer=plaintext_footer)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    with pq.ParquetWriter(tmp_path / "x.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    assert data_inputs.read(tmp_path / "x.parquet") == ([], [("x.parquet", "", "encrypted Parquet")])


def test_lists_of_fixed_size(read):
    lists = pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2))
    assert read(pa.table({"text": lists})) == ([b"a\nb", b"c"], [])
    texts, [row] = read(pa.table({"text": pa.array([["a", "b"], None], pa.list_(pa.string(), 2))}))
    assert (texts, row.reason) == ([], "cannot be read")
    assert row.detail.startswith("a list of fixed size has null rows")


def test_lists_of_any_length(read):
    lists = [[], ["a"] * 500, [["b"]][0], None, ["c", "d", "e"]] * 40
    expected = [b"", b"\n".join([b"a"] * 500), b"b", None, b"c\nd\ne"] * 40
    assert read(pa.table({"text": lists})) == (expected, [])


NESTED = pa.table(
    {
        "id": [1, 2, 3],
        "meta": [{"text": "x", "deep": {"er": "y"}, "n": 1}, None, {"text": None, "deep": None, "n": 2}],
        "messages": [[{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}], [], None],
        "a.b": [{"c.d": "z"}, {"c.d": "w"}, {"c.d": None}],
        "meta.n": ["literal", "names", "first"],
    }
)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("meta.text", [b"x", None, None]),
        ("meta.deep.er", [b"y", None, None]),
        ("messages.content", [b"hi\nyes", b"", None]),
        ("a.b.c.d", [b"z", b"w", None]),
        ("meta.n", [b"literal", b"names", b"first"]),
    ],
)
def test_a_field_within_a_column(read, key: str, values: list):
    assert read(NESTED, key) == (values, [])


@pytest.mark.parametrize(
    ("key", "reason", "detail"),
    [
        ("meta", "not text", "choose one of meta.text, meta.deep, meta.n"),
        ("messages", "not text", "choose one of messages.role, messages.content"),
        ("meta.nothing", "missing column", "among id, meta, messages"),
        ("id", "not text", "int64"),
        ("id.x", "missing column", "id.x"),
        ("", "missing column", "''"),
        (".", "missing column", "'.'"),
    ],
)
def test_a_column_that_is_not_text_is_one_refusal(read, key: str, reason: str, detail: str):
    values, [bad] = read(NESTED, key)
    assert values == []
    assert bad.reason == reason
    assert detail in bad.detail


def test_a_column_name_that_occurs_twice(read):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    assert read(pa.Table.from_arrays(columns, names=["id", "text", "id"])) == ([b"b"], [])
    values, [bad] = read(pa.Table.from_arrays(columns, names=["text", "id", "text"]))
    assert (values, bad.reason, bad.detail) == ([], "ambiguous column", "2 columns are named 'text'")


def test_only_the_field_is_read(read):
    """Other fields beside it are not decompressed, and do not count towards the budget."""
    beside = pa.array(["\0" * (30 * MIB)])
    meta = pa.StructArray.from_arrays([pa.array(["x"]), beside], names=["text", "zeros"])
    assert read(pa.table({"meta": meta}), "meta.text", compression="zstd") == ([b"x"], [])


def test_an_endless_list_is_refused_by_the_footer(read):
    nulls = pa.ListArray.from_arrays([0, 1 << 22], pa.nulls(1 << 22, pa.string()))
    values, [bad] = read(pa.table({"text": nulls}), compression="zstd")
    assert (values, bad.reason) == ([], "expands beyond the limit")

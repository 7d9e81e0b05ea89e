"""Class folders of images and CSV rows become Parquet that training reads, with a split that keeps what it promises."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import png

from configs import ConfigError, load
from trainer.data.kinds import kind_of
from trainer.data.prepare.labelled import prepare_images, prepare_rows, split_rows

SHARES = st.sampled_from([0.0, 0.05, 0.2, 0.5])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), SHARES, st.integers(0, 3))
def test_a_stratified_split_has_the_share_of_every_class(of, share, seed):
    of = np.array(of)
    held_out = split_rows("stratified", share, seed, of)
    for each in set(of.tolist()):
        assert held_out[of == each].sum() == round(share * (of == each).sum())
    assert (held_out == split_rows("stratified", share, seed, of)).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), SHARES, st.integers(0, 3))
def test_a_grouped_split_parts_no_group(of, share, seed):
    of = np.array(of)
    held_out = split_rows("grouped", share, seed, of)
    assert not set(of[held_out]) & set(of[~held_out])
    largest = np.bincount(of).max()
    assert abs(held_out.sum() - share * len(of)) <= largest / 2


def test_a_split_is_a_function_of_the_seed():
    of = np.arange(100) // 4
    for how in ("random", "stratified", "grouped"):
        splits = [split_rows(how, 0.5, seed, of).tolist() for seed in (0, 0, 1)]
        assert splits[0] == splits[1] != splits[2]


@pytest.fixture
def folders(tmp_path):
    """12 images of each of three classes, whose shade is the class, one of them in a folder further down."""
    for number, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "in" / name / "more").mkdir(parents=True)
        for i in range(12):
            file = tmp_path / "in" / name / ("more" if i == 0 else ".") / f"{i}.png"
            file.write_bytes(png(np.full((8, 8), 100 * number + i, np.uint8)))
    return tmp_path / "in"


def opened(model, path, split, *keys):
    config = load("wine", [f"model={model}", f"data.path={path}", *keys])
    return kind_of(config).open(config, split)


def test_class_folders(muster, tmp_path, folders):
    (folders / "dog" / "notes.txt").write_text("x")
    (folders / "owl" / "broken.png").write_bytes(b"x")
    out = tmp_path / "out"
    words = ("--kind", "images", "--split", "stratified", "--held-out", "0.25", "--out", str(out))
    code, said, _ = muster("data", "prepare", str(folders), *words)
    assert code == 0
    assert said.splitlines() == [
        "27 images to train on, 9 held out",
        "3 classes: 0 cat, 1 dog, 2 owl",
        f"2 files left out, not readable as PNG or JPEG: the first is {folders}/dog/notes.txt",
        f"to train on it: data.path={out}",
    ]
    seen = []
    for split in ("train", "held_out"):
        model = "{family: mlp, inputs: 64, outputs: 3}"
        reader = opened(model, out, split, "data.kind=images", "data.images.channels=1")
        batch = reader.examples(range(len(reader)))
        shades = batch.images[:, 0, 0, 0].tolist()
        assert [shade // 100 for shade in shades] == batch.labels.tolist()
        assert sorted(batch.labels.tolist()) == sorted([0, 1, 2] * (len(reader) // 3))
        seen += shades
    assert sorted(seen) == [100 * number + i for number in range(3) for i in range(12)]
    table = pq.read_table(out / "train.parquet")
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"][1] == "dog"
    assert len(set(table["label"].to_pylist()[:9])) > 1  # not class by class
    code, _, err = muster("data", "prepare", str(folders), *words)
    assert (code, "already exists: choose another folder" in err) == (2, True)
    with pytest.raises(ConfigError, match="leave out --strict"):
        prepare_images([str(folders)], tmp_path / "other", "random", 0.1, 0, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def write(path, rows, header=("size", "weight", "patient", "kind"), delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


ROWS = [(i, i / 8, f"p{i // 5}", ("oak", "elm")[i % 2]) for i in range(40)]


def test_rows_by_group(muster, tmp_path):
    files = [write(tmp_path / "a.csv", ROWS[:20]), write(tmp_path / "b.tsv", ROWS[20:], delimiter="\t")]
    out = tmp_path / "out"
    words = ["--kind", "rows", "--label", "kind", "--split", "grouped", "--group", "patient", "--held-out", "0.25"]
    code, said, _ = muster("data", "prepare", *files, *words, "--out", str(out))
    assert code == 0
    assert said.splitlines() == [
        "30 rows to train on, 10 held out",
        "2 classes: 0 elm, 1 oak",
        f"to train on it: data.path={out} data.rows.labels=[kind]",
    ]
    patients = []
    for split, size in (("train", 30), ("held_out", 10)):
        keys = "data.rows.labels=[kind]", "data.rows.standardise=false"
        reader = opened("{family: mlp, inputs: 2, outputs: 2}", out, split, *keys)
        assert (len(reader), reader.names) == (size, ("size", "weight"))
        sizes = reader.features[:, 0].long()
        assert reader.labels.tolist() == [1 - size % 2 for size in sizes.tolist()]
        patients.append({size // 5 for size in sizes.tolist()})
    assert (len(patients[0]), len(patients[1]), patients[0] & patients[1]) == (6, 2, set())


def test_numbers_are_kept_and_a_missing_class_is_none(tmp_path):
    rows = [(1, 0.5, "p", "oak"), (2, 1.5, "q", ""), (3, 2.5, "r", "elm"), (4, 3, "s", "elm")]
    file = write(tmp_path / "a.csv", rows)
    made = prepare_rows([file], tmp_path / "out", "random", 0.0, 0, ("weight",), leave_out=("patient", "kind"))
    assert (made.sizes, made.classes) == ({"train": 4, "held_out": 0}, [])
    table = pq.read_table(tmp_path / "out")
    assert sorted(table["weight"].to_pylist()) == [0.5, 1.5, 2.5, 3]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]
    made = prepare_rows([file], tmp_path / "named", "stratified", 0.5, 0, ("kind",), leave_out=("patient",))
    assert (made.classes, sum(made.sizes.values())) == (["elm", "oak"], 4)
    classes = pq.read_table(tmp_path / "named").to_pylist()
    assert {row["size"]: row["kind"] for row in classes} == {1: 1, 2: None, 3: 0, 4: 0}


MISTAKES = {
    "kind": (["--kind", "sounds"], "--kind sounds: should be text, images, rows, pairs"),
    "split": (["--kind", "rows", "--split", "even"], "--split even: should be random, stratified or grouped"),
    "an option of text": (["--kind", "rows", "--tokenizer", "bytes"], "--tokenizer does not apply to --kind rows"),
    "an option of rows": (["--group", "patient"], "--group does not apply to --kind text"),
    "no folder": (["--kind", "images"], "--kind images takes one folder, with a subfolder of images for each class"),
    "no label": (["--kind", "rows"], "--label label: the files have no such column (they have size, weight,"),
    "text": (["--kind", "rows", "--label", "size"], "column patient is string, not numbers: leave it out with --leave"),
    "no group": (["--kind", "rows", "--label", "kind", "--split", "grouped"], "--split grouped needs --group COLUMN"),
    "classes": (
        [
            "--kind",
            "rows",
            "--label",
            "weight",
            "--leave-out",
            "patient",
            "--leave-out",
            "kind",
            "--split",
            "stratified",
        ],
        "--split stratified needs a single label",
    ),
    "nothing held out": (
        ["--kind", "rows", "--label", "kind", "--leave-out", "patient", "--held-out", "0.001"],
        "--held-out 0.001 of 40 leaves nothing to hold out",
    ),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(muster, tmp_path, words, said):
    file = write(tmp_path / "a.csv", ROWS)
    code, out, err = muster("data", "prepare", file, "--out", str(tmp_path / "out"), *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"muster: {said}")


@pytest.mark.parametrize(("kind", "header"), [("rows", "size,label"), ("pairs", "source,target")])
def test_a_file_of_a_header_alone_has_no_rows(muster, tmp_path, kind, header):
    (tmp_path / "a.csv").write_text(header + "\n")
    words = ("--kind", kind, "--out", str(tmp_path / "out"))
    code, out, err = muster("data", "prepare", str(tmp_path / "a.csv"), *words)
    assert (code, out) == (2, "")
    assert err == "muster: the files have no rows that can be used\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,label\n1\n", "cannot be read as CSV"),
        ("a,a,label\n1,2,3\n", "two columns have the same name"),
        ("", "cannot be read as CSV"),
    ],
)
def test_what_is_no_csv(tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ConfigError, match=said):
        prepare_rows([str(tmp_path / "x.csv")], tmp_path / "out", "random", 0.1, 0)

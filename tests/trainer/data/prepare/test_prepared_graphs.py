"""Molecules, graphs and nodes listed by their edges, and pairs, become Parquet that training reads."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from configs import ConfigError, from_dict, load
from trainer.data.kinds import kind_of
from trainer.data.prepare.graphs import prepare_graphs, prepare_nodes
from trainer.data.prepare.labelled import prepare_pairs

WATER = """water
  by hand

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 O   0  0
    0.9572    0.0000    0.0000 H   0  0
   -0.2400    0.9270    0.0000 H   0  0
  1  2  1  0
  1  3  1  0
M  END
> <gap>
0.33

> <phase> (1)
liquid

$$$$
"""
CARBON_DIOXIDE = """

made up
  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 O   0  0
    1.1600    0.0000    0.0000 C   0  0
    2.3200    0.0000    0.0000 O   0  0
  1  2  2  0
  2  3  2  0
M  END
> <gap>
0.41

> <phase>
gas

$$$$
"""
DAMAGED = {
    "it has no V2000 table of atoms": WATER.replace("V2000", "V3000"),
    "it ends within its 30 atoms and 2 bonds": WATER.replace("  3  2", " 30  2"),
    "Xx is no element": WATER.replace(" O ", " Xx"),
    "the bond 1  9  1 joins an atom that is not there": WATER.replace("  1  3  1", "  1  9  1"),
    "its table: invalid literal": WATER.replace("  1  3  1", "  1  a  1"),
    "it has no label": WATER.replace("<gap>", "<other>"),
    "it has no node": WATER.replace("  3  2  0", "  0  0  0"),
}


def rows(out):
    return [row for path in sorted(out.iterdir()) for row in pq.read_table(path).to_pylist()]


def opened(path, split="train", **model):
    model = {"family": "gnn", "layer": "gin"} | model
    data = {"path": str(path)} | ({"kind": "nodes"} if "classes" in model else {})
    config = from_dict({"model": {k: v for k, v in model.items() if k != "classes"}, "data": data})
    return kind_of(config).open(config, split)


def test_molecules(tmp_path, muster):
    file = tmp_path / "x.SDF"
    file.write_text((WATER + CARBON_DIOXIDE) * 10)
    words = ("--kind", "graphs", "--label", "phase", "--split", "stratified", "--held-out", "0.2")
    code, said, _ = muster("data", "prepare", str(file), *words, "--out", str(tmp_path / "out"))
    assert (code, said.splitlines()) == (0, [
        "16 graphs to train on, 4 held out", "2 classes: 0 gas, 1 liquid",
        f"to train on it: data.path={tmp_path / 'out'}",
    ])  # fmt: skip
    found = rows(tmp_path / "out")
    gas = {"edge_index": [[0, 1, 1, 2], [1, 0, 2, 1]], "node_feat": [[8], [6], [8]], "edge_attr": [[2]] * 4, "y": [0],
           "num_nodes": 3}  # fmt: skip
    liquid = {"edge_index": [[0, 1, 0, 2], [1, 0, 2, 0]], "node_feat": [[8], [1], [1]], "edge_attr": [[1]] * 4,
              "y": [1], "num_nodes": 3}  # fmt: skip
    assert sorted(found, key=lambda row: row["y"]) == [gas] * 10 + [liquid] * 10
    features = json.loads(pq.read_schema(tmp_path / "out/train.parquet").metadata[b"huggingface"])["info"]["features"]
    assert features["node_feat"]["feature"] == {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}
    sizes = {"inputs": 1, "categories": 10, "edge_inputs": 1, "edge_categories": 4, "outputs": 2}
    batch = opened(tmp_path / "out", "held_out", **sizes).examples([0, 1, 2, 3])
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    for label, nodes in zip(batch.labels.tolist(), batch.nodes.view(4, 3).tolist(), strict=True):
        assert nodes == ([8, 1, 1] if label else [8, 6, 8])


def test_numbers_of_molecules(tmp_path):
    (tmp_path / "x.sdf").write_text((WATER + CARBON_DIOXIDE).replace("\n", "\r\n"), newline="")
    prepare_graphs([str(tmp_path / "x.sdf")], tmp_path / "out", "random", 0.0, 0, "gap")
    assert sorted(row["y"] for row in rows(tmp_path / "out")) == [[0.33], [0.41]]


@pytest.mark.parametrize("reason", DAMAGED)
def test_a_molecule_that_cannot_be_used_is_named_and_left_out(tmp_path, reason):
    file = tmp_path / "x.sdf"
    file.write_text(WATER + DAMAGED[reason] + CARBON_DIOXIDE)
    made = prepare_graphs([str(file)], tmp_path / "out", "random", 0.0, 0, "gap")
    assert made.left_out.startswith(f"1 graph left out: the first is molecule 2 of {file}: {reason}")
    assert [row["y"] for row in rows(tmp_path / "out")] in ([[0.33], [0.41]], [[0.41], [0.33]])
    with pytest.raises(ConfigError, match=r"correct them, or leave out --strict"):
        prepare_graphs([str(file)], tmp_path / "strict", "random", 0.0, 0, "gap", strict=True)


TU = {
    "A": "1, 2\n2, 1\n3, 4\n4, 3\n4, 5\n5, 4\n", "graph_indicator": "1\n1\n2\n2\n2\n3\n",
    "graph_labels": "-1\n1\n1\n", "node_labels": "3\n4\n3\n3\n4\n4\n",
    "edge_attributes": "".join(f"{i}.5\n" for i in range(6)),
}  # fmt: skip


def folder(tmp_path, **files):
    (tmp_path / "tu").mkdir()
    for what, text in (TU | files).items():
        (tmp_path / "tu" / f"TOY_{what}.txt").write_text(text)
    return str(tmp_path / "tu")


def test_a_folder_of_tudataset(tmp_path):
    made = prepare_graphs([folder(tmp_path)], tmp_path / "out", "random", 0.0, 0)
    assert (made.sizes, made.classes) == ({"train": 3, "held_out": 0}, ["-1", "1"])
    assert sorted(rows(tmp_path / "out"), key=lambda row: row["num_nodes"]) == [
        {"edge_index": [[], []], "node_feat": [[1]], "edge_attr": [], "y": [1], "num_nodes": 1},
        {"edge_index": [[0, 1], [1, 0]], "node_feat": [[0], [1]], "edge_attr": [[0.5], [1.5]], "y": [0],
         "num_nodes": 2},
        {"edge_index": [[0, 1, 1, 2], [1, 0, 2, 1]], "node_feat": [[0], [0], [1]],
         "edge_attr": [[2.5], [3.5], [4.5], [5.5]], "y": [1], "num_nodes": 3},
    ]  # fmt: skip


WRONG = {
    "two graphs": ({"A": "1, 2\n2, 3\n"} | {"edge_attributes": "1\n2\n"}, r"TOY_A\.txt: edge 2 joins two graphs"),
    "no such node": ({"A": "1, 9\n", "edge_attributes": "1\n"}, r"an edge is two nodes, from 1 to 6"),
    "order": ({"graph_indicator": "1\n1\n2\n2\n1\n3\n"}, r"graphs must ascend from 1 to 3"),
    "too few": ({"node_labels": "1\n2\n"}, r"TOY_node_\*\.txt has 2 lines for 6 nodes: give each one"),
    "words": ({"A": "1, x\n"}, r"TOY_A\.txt: invalid literal"),
    "large": ({"node_labels": f"{10**30}\n" * 6}, r"TOY_node_labels\.txt: Python int too large"),
}


@pytest.mark.parametrize(("files", "message"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_wrong(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        prepare_graphs([folder(tmp_path, **files)], tmp_path / "out", "random", 0.0, 0)


def nodes_and_edges(tmp_path):
    (tmp_path / "nodes.csv").write_text("id,label,age\na,x,1\nb,y,2\nc,,3\nd,x,4\n")
    (tmp_path / "edges.tsv").write_text("from\tto\na\tb\nb\tc\nd\ta\nb\ta\n")
    return [str(tmp_path / "edges.tsv"), str(tmp_path / "nodes.csv")]


def test_nodes(tmp_path, muster):
    files, out = nodes_and_edges(tmp_path), tmp_path / "out"
    code, said, _ = muster("data", "prepare", *files, "--kind", "nodes", "--out", str(out))
    assert (code, said.splitlines()) == (0, [
        "3 nodes to train on, 0 held out", "2 classes: 0 x, 1 y", "1 node without a label",
        f"to train on it: data.path={out} data.kind=nodes",
    ])  # fmt: skip
    [row] = rows(out)
    assert (row["node_feat"], row["y"]) == ([[1], [2], [3], [4]], [0, 1, None, 0])
    assert {(a, b) for a, b in zip(*row["edge_index"], strict=True)} == {
        (0, 1), (1, 0), (1, 2), (2, 1), (3, 0), (0, 3),
    }  # fmt: skip
    reader = opened(out, classes=True, inputs=1, categories=5, outputs=2)
    assert set(reader.examples(range(3)).labels.tolist()) <= {0, 1}
    prepare_nodes(files, tmp_path / "one-way", directed=True)
    assert rows(tmp_path / "one-way")[0]["edge_index"] == [[0, 1, 3, 1], [1, 2, 0, 0]]
    (tmp_path / "edges.tsv").write_text("from\tto\na\tz\n")
    with pytest.raises(ConfigError, match="an edge has a node with the id z, which the nodes have not"):
        prepare_nodes(files, tmp_path / "lost")
    (tmp_path / "edges.tsv").write_text("from\tto\n1\t2\n\t1\n")
    (tmp_path / "nodes.csv").write_text("id,label\n1,x\n2,y\n")
    with pytest.raises(ConfigError, match="an edge lacks the id of a node"):
        prepare_nodes(files, tmp_path / "lost")
    (tmp_path / "edges.tsv").write_text("from\tto\n0\t1\n")  # counted from 0, the nodes from 1
    with pytest.raises(ConfigError, match="an edge has a node with the id 0, which the nodes have not"):
        prepare_nodes(files, tmp_path / "lost")
    with pytest.raises(ConfigError, match="--kind nodes takes two CSV or TSV files"):
        prepare_nodes(files[:1], tmp_path / "lost")


def test_pairs(tmp_path, muster):
    file = tmp_path / "x.tsv"
    lines = [f'{n}\t"{n}" in English\tAB' for n in range(20)] + ["\tnothing\tCD"]
    file.write_text("\n".join(["en\tde\tby", *lines]) + "\n")
    words = ("--kind", "pairs", "--source", "en", "--target", "de", "--held-out", "0.2", "--out", str(tmp_path / "out"))
    code, said, _ = muster("data", "prepare", str(file), *words)
    assert (code, said.splitlines()[:2]) == (0, [
        "16 pairs to train on, 4 held out", "1 pair left out, a text is empty: the first is row 20",
    ])  # fmt: skip
    assert sorted(rows(tmp_path / "out"), key=lambda row: int(row["source"])) == [
        {"source": str(n), "target": f'"{n}" in English'} for n in range(20)
    ]
    keys = [f"data.path={tmp_path / 'out'}", "data.prepare.tokenizer=bytes"]
    config = load("seq2seq", keys)
    config = config.model_copy(update={"data": kind_of(config).ensure(config)[0]})
    batch = kind_of(config).open(config, "held_out").examples([0])
    assert isinstance(batch.source_ids, torch.Tensor)
    grouped = prepare_pairs([str(file)], tmp_path / "grouped", "grouped", 0.5, 0, ("en", "de"), "en")
    assert grouped.sizes == {"train": 10, "held_out": 10}
    for keys, message in (
        ({"columns": ("en", "fr")}, r"--target fr: the files have no such column \(they have en, de, by\)"),
        ({"how": "stratified"}, "needs classes, which pairs have not"),
        ({"columns": ("en", "de"), "strict": True}, "1 pair left out, a text is empty.* leave out --strict"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_pairs([str(file)], tmp_path / "no", **{"how": "random", "share": 0.1, "seed": 0} | keys)

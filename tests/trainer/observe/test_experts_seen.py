"""What a user sees of the experts: the tokens that they take, in every topology, and when one collapses."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from experts_seen import seen_pieces
from faults import collapse_soon
from support import resolved, tiny, train_in_process
from teams import in_team

from configs import Config
from models.families import build
from models.loss import IGNORE
from models.moe import collapse
from models.moe.balance import RouterTap
from models.tasks.table import task_of
from models.tasks.task import Task
from trainer.data.read.reader import Dataset
from trainer.data.tokenizer.tokenizer import byte_tokenizer
from trainer.observe import expert_tokens
from trainer.observe.expert_tokens import ExpertTokens, table, top_tokens, write_table
from trainer.record.lines import read_events
from trainer.run.folder import prepare_run

KINDS = ("json", "md")
"""Of files that a table is written to."""


def test_top_tokens_are_those_of_a_plain_count():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 20, 500)
    choice = np.stack([(tokens + random.integers(0, 3, 500)) % 8, (tokens * 5 + 4) % 8], axis=1)
    occurs, taken = Counter(tokens.tolist()), Counter()
    for token, experts in zip(tokens.tolist(), choice.tolist(), strict=True):
        for expert in experts:
            taken[expert, token] += 1

    def surplus(expert: int, token: int) -> float:
        load = sum(count for (e, _), count in taken.items() if e == expert) / len(tokens)
        return taken[expert, token] * math.log(taken[expert, token] / occurs[token] / load)

    found = top_tokens(tokens, choice, 9)
    assert found[8] == [], "an expert without a token"
    for expert in range(8):
        order = sorted((-surplus(e, token), token) for e, token in taken if e == expert)
        expected = [token for score, token in order if score < 0][: expert_tokens.TOP]
        assert [t.token for t in found[expert]] == expected
        for t in found[expert]:
            assert t.times == taken[expert, t.token]
            assert t.share == pytest.approx(t.times / occurs[t.token])


def test_an_expert_that_takes_every_token_has_none_beyond_its_share():
    assert top_tokens(np.array([3, 4, 4]), np.array([[0, 1], [0, 1], [0, 2]]), 3) == [[], [(3, 1, 1.0)], [(4, 1, 0.5)]]


def test_the_newest_tables_stay(tmp_path):
    def write(step: int) -> None:
        write_table({"step": step, "tokens": 0, "top_k": 1, "layers": []}, tmp_path / f"experts-step-{step:08d}")

    def steps() -> list[int]:
        found = [sorted(int(path.stem[-8:]) for path in tmp_path.glob(f"experts-step-*.{kind}")) for kind in KINDS]
        assert found[0] == found[1]
        return found[0]

    (tmp_path / "step-00000010.txt").touch()
    for step in range(10, 100, 10):
        write(step)
    assert steps() == [50, 60, 70, 80, 90]
    write(60)  # again, after a restart: those of later steps come again too
    assert steps() == [50, 60, 70, 80, 90]
    for step in (70, 80, 90, 100):
        write(step)
    assert steps() == [60, 70, 80, 90, 100]
    assert (tmp_path / "step-00000010.txt").exists()


def test_written_table(tmp_path):
    config = resolved(model={"num_layers": 4, "first_dense_layers": 1, "num_experts": 3, "top_k": 1})
    tokens = np.array([ord("`"), 10, 200, 256, 300], np.int32)
    choice = np.array([[0], [0], [1], [1], [1]], np.int16)
    found = table([(tokens[:2], {1: choice[:2]}), (tokens[2:], {1: choice[2:]})], config, byte_tokenizer(), 7)
    write_table(found, tmp_path / "samples" / "experts-step-00000007")
    assert json.loads((tmp_path / "samples" / "experts-step-00000007.json").read_text()) == found
    assert (found["step"], found["tokens"], found["layers"][0]["layer"]) == (7, 5, 1)
    assert (tmp_path / "samples" / "experts-step-00000007.md").read_text().splitlines()[7:] == [
        "## MoE layer 0 (layer 1 of the model)",
        "",
        "- expert 0, 1.20x: `'\\n'` 1 100%, `` '`' `` 1 100%",
        "- expert 1, 1.80x: `È` 1 100%, `<|endoftext|>` 1 100%, `<300>` 1 100%",
        "- expert 2, 0.00x: none",
    ]


def settings(data, **parallel) -> Config:
    return resolved(
        model={"num_layers": 4, "num_kv_heads": 4, "moe_every": 2} if parallel.get("ep", 1) == 1 else {},
        train={"global_batch": 8, "micro_batch": 2, "eval_sequences": 7},
        data={"path": str(data)},
        parallel=parallel,
    )


def plain_pieces(config: Config) -> list[expert_tokens.Piece]:
    """One sequence after the other, by the plain model."""
    module = build(config.model)
    module.init_weights(config.run.seed)
    tap = RouterTap(module.eval(), config.model)
    held_out, pieces = Dataset(config.data, config.train.seq_len, 0, split="held_out"), []
    for index in range(min(config.train.eval_sequences, len(held_out))):
        batch = held_out.examples([index])
        with torch.no_grad():
            module(batch)
        scored = batch.labels[0] != IGNORE
        layers = [chooser.layer for chooser in tap.choosers]
        choices = [choice[scored].numpy() for choice in tap.choices()]
        pieces.append((batch.input_ids[0, scored].numpy(), dict(zip(layers, choices, strict=True))))
    return pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [
        {},
        {"pp": 2},
        {"dp": 2, "ep": 2},
        {"tp": 2},
        {"sp": 2},
        {"tp": 2, "ep": 2},
        {"dp": 2, "pp": 2},
        {"pp": 2, "pp_schedule": "dualpipev"},
    ],
    ids=lambda topology: "-".join(f"{k}{v}" for k, v in topology.items()) or "one",
)
def test_every_topology_sees_the_same_tokens(tiny_data, topology):
    config = settings(tiny_data, **topology)
    first, *others = in_team(config.parallel.world_size, seen_pieces, config)
    assert others == [None] * len(others)
    expected = table(plain_pieces(config), config, byte_tokenizer(), 1)
    assert len(expected["layers"]) == 2
    assert table(first, config, byte_tokenizer(), 1) == expected


def test_at_most_the_examined_tokens_are_kept(tiny_data, monkeypatch):
    config = settings(tiny_data)
    monkeypatch.setattr(expert_tokens, "LOOKED_AT", 50)
    seen = ExpertTokens(config, build_place(), task_of_one_layer(config))
    held_out = Dataset(config.data, 32, 0, split="held_out")
    for index in range(3):
        seen.add(held_out.examples([index]), [torch.zeros(32, 2, dtype=torch.int64)])
    (piece,) = seen.gather() or []
    assert (piece[0].shape, piece[1][1].shape) == ((50,), (50, 2))


def task_of_one_layer(config: Config) -> Task:
    task = task_of(config)
    task.attach({"": build(config.model)})
    task.choosers = task.choosers[:1]
    return task


def build_place():
    from trainer.engine.parallel import Place

    return Place(0, 0, 0, 0)


def follow(loads: list[list[list[float]]]) -> tuple[list[list[int]], list[tuple]]:
    starved: collapse.Starved = []
    events = []
    for step, load in enumerate(loads, 1):
        starved, changes = collapse.after_step(starved, load)
        events += [(step, change.event, change.details["experts"], change.details["collapsed"]) for change in changes]
    return starved, events


def test_collapse_on_a_hand_written_sequence():
    even, one, both = [0.25] * 4, [0.5, 0.248, 0.25, 0.002], [0.002, 0.0, 0.5, 0.498]
    edge = [0.2525, 0.25, 0.495, 0.0025]  # exactly 1% of an even share is not under it
    loads = [[even, one]] * 99 + [[even, edge]] + [[both, one]] * 100 + [[even, one]] + [[both, even]] * 2
    starved, events = follow(loads)
    assert events == [
        (200, "experts_collapsed", {"0": [0, 1], "1": [3]}, 3),
        (201, "experts_recovered", {"0": [0, 1]}, 1),
        (202, "experts_recovered", {"1": [3]}, 0),
    ]
    assert starved == [[2, 2, 0, 0], [0, 0, 0, 0]]


def test_dense_and_non_finite_loads_are_no_collapse():
    assert collapse.after_step([], []) == ([], [])
    assert follow([[[math.nan] * 4]] * 101) == ([[0] * 4], [])


def changes(run_dir) -> list[tuple]:
    return [
        (event["step"], event["event"], event["experts"], event["collapsed"])
        for event in read_events(run_dir)
        if event["event"].startswith("experts_")
    ]


@pytest.mark.slow
def test_a_stopped_run_records_the_same_events_and_tables(tmp_path, tiny_data):
    def make(name):
        train = {"steps": 10, "micro_batch": 2, "eval_every": 8}
        sections = {"run": {"name": name, "root": str(tmp_path)}, "data": {"path": str(tiny_data)}, "train": train}
        return prepare_run(tiny(optim={"lr": 0.02}, **sections))

    whole, stopped = make("whole"), make("stopped")
    assert train_in_process(whole, collapse_soon) == 0
    assert train_in_process(stopped, collapse_soon, 5) == 75
    assert train_in_process(stopped, collapse_soon) == 0
    assert {"experts_collapsed", "experts_recovered"} == {name for _, name, *_ in changes(whole)}
    assert changes(stopped) == changes(whole)
    for suffix in ("json", "md"):
        names = [f"experts-step-000000{step}.{suffix}" for step in ("08", "10")]
        assert sorted(path.name for path in (whole / "samples").glob(f"*.{suffix}")) == names
        for name in names:
            assert (stopped / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()

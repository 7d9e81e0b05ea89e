"""`muster eval` of a run on a mixture: every source is reported, and each is weighted by its tokens."""

import json
import math
from pathlib import Path

import pytest
from support import tiny, train_in_process

from configs.sections.data import PrepareConfig
from trainer.data.manifest import TOKENIZER, read_manifest
from trainer.data.prepare.prepare import prepare
from trainer.run.folder import prepare_run


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run on two prepared folders with the same tokenizer, which packs one more densely than the other."""
    root = tmp_path_factory.mktemp("mixture")
    texts = {
        "words": [f"the same few words again and again {number}\n" * 20 for number in range(40)],
        "digits": ["".join(str(number**5 * digit % 9973) for digit in range(150)) for number in range(40)],
    }
    tokenizer, folders = "bpe", []
    for name, documents in texts.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        config = PrepareConfig(tokenizer=tokenizer, vocab_size=300, held_out=0.2)
        prepare([root / f"{name}.jsonl"], root / name, config, workers=1, progress=False)
        folders.append(root / name)
        tokenizer = str(root / name / TOKENIZER)
    path = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, (3, 1), strict=True)]
    train = {"steps": 2, "eval_every": 0}
    run_dir = prepare_run(tiny(run={"name": "mixed", "root": str(root)}, data={"path": path}, train=train))
    assert train_in_process(run_dir) == 0
    return run_dir, folders


def test_a_mixture_is_evaluated_by_source_and_as_a_whole(mixture, muster):
    run_dir, folders = mixture

    def evaluate(*arguments: str) -> dict:
        code, out, _ = muster("eval", "mixed", "--root", str(run_dir.parent), "--json", *arguments)
        assert code == 0
        return json.loads(out)

    whole = evaluate()
    alone = [evaluate("--data", str(folder)) for folder in folders]
    splits = [read_manifest(folder).splits["held_out"] for folder in folders]
    assert splits[0].bytes / splits[0].tokens > 3 * splits[1].bytes / splits[1].tokens
    assert [part["data"] for part in whole["sources"]] == [str(folder) for folder in folders]
    for part, each, split in zip(whole["sources"], alone, splits, strict=True):
        for key in ("loss", "tokens", "sequences", "bits_per_byte", "unigram_entropy"):
            assert part[key] == pytest.approx(each[key], rel=1e-6), key
        assert part["unigram_entropy"] == split.entropy
        assert part["bits_per_byte"] == pytest.approx(part["loss"] / math.log(2) * split.tokens / split.bytes)
    tokens = [each["tokens"] for each in alone]
    nats = sum(each["loss"] * each["tokens"] for each in alone)
    assert whole["tokens"] == sum(tokens)
    assert whole["loss"] == pytest.approx(nats / sum(tokens), rel=1e-6)
    size = sum(n * split.bytes / split.tokens for n, split in zip(tokens, splits, strict=True))
    assert whole["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    low, high = sorted(part["bits_per_byte"] for part in whole["sources"])
    assert 1.5 * low < whole["bits_per_byte"] < high / 1.5, "neither source's own"
    entropy = sum(split.entropy * n for n, split in zip(tokens, splits, strict=True)) / sum(tokens)
    assert whole["unigram_entropy"] == pytest.approx(entropy)


def test_it_is_printed_by_source(mixture, muster):
    run_dir, folders = mixture
    code, out, _ = muster("eval", "mixed", "--root", str(run_dir.parent), "--sequences", "8")
    assert code == 0
    lines = out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == [str(folder) for folder in folders]
    assert lines[-1].startswith("held-out loss ")
    assert all("bits per byte; unigram entropy" in line for line in lines)


def test_a_source_with_nothing_held_out_is_named(mixture, muster, tmp_path):
    _, folders = mixture
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"{number} more" * 99}) + "\n" for number in range(9))
    )
    config = PrepareConfig(tokenizer=str(folders[0] / TOKENIZER), held_out=0.0)
    prepare([tmp_path / "x.jsonl"], tmp_path / "x", config, workers=1, progress=False)
    path = [{"path": str(folder)} for folder in (folders[0], tmp_path / "x")]
    train = {"steps": 1, "eval_every": 0}
    run_dir = prepare_run(tiny(run={"name": "two", "root": str(tmp_path)}, data={"path": path}, train=train))
    assert train_in_process(run_dir) == 0
    code, out, _ = muster("eval", "two", "--root", str(tmp_path), "--sequences", "8")
    assert code == 0
    assert f"{tmp_path / 'x'}: has no held-out documents, so it is not part of this loss" in out.splitlines()


def test_a_folder_that_is_two_sources_counts_as_both(mixture, muster, tmp_path):
    _, folders = mixture
    names = [str(folders[0]), str(folders[1]), str(folders[0])]
    path = [{"path": name} for name in names]
    train = {"steps": 1, "eval_every": 0}
    run_dir = prepare_run(tiny(run={"name": "twice", "root": str(tmp_path)}, data={"path": path}, train=train))
    assert train_in_process(run_dir) == 0
    code, out, _ = muster("eval", "twice", "--root", str(tmp_path), "--json")
    told = json.loads(out)
    assert code == 0
    assert [part["data"] for part in told["sources"]] == told["data"] == names
    for key in ("tokens", "sequences"):
        assert told[key] == sum(part[key] for part in told["sources"])

"""Files within the bounds on their bytes, made to take more time and memory than they should once they are read."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.runs import run_folder
from cluster.server.messages import BadMessage, parse
from configs import ConfigError
from configs.sections.data import PrepareConfig
from trainer.checkpoint import store
from trainer.checkpoint.manifest import CheckpointError, parse_manifest
from trainer.checkpoint.store import Reader, Snapshot
from trainer.data.manifest import Manifest, SplitStats, TokenizerInfo, write_manifest
from trainer.data.show import inspect
from trainer.state import TrainState

MEGABYTES = 500
"""Of memory, beyond the imports."""
READ = """
import resource, sys
from cluster.sweep.train.progress import read_plan
from trainer.checkpoint.store import verify
from trainer.data.manifest import read_manifest
from pathlib import Path

with open("/proc/self/statm") as file:
    before = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))  # ends what does not end
resource.setrlimit(resource.RLIMIT_AS, (before + int(sys.argv[2]) * 2**20,) * 2)
read = {"plan": read_plan, "prepared": read_manifest, "checkpoint": lambda path: print(*verify(path, digests=False))}
for path in sys.argv[3:]:
    try:
        read[sys.argv[1]](Path(path))
    except ValueError as error:
        print(error)
    print("\\0", end="")
"""


def read(kind: str, *folders: Path) -> list[str]:
    """What is said of each folder, by a process that may hold MEGABYTES more than its imports."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", READ, kind, str(MEGABYTES), *map(str, folders)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [said.strip() for said in done.stdout.split("\0")[:-1]]


def changed(path: Path, to: Path, at: tuple[str, ...], value: Any) -> Path:
    """A copy of a JSON file with another value, in a folder of its own."""
    tree = found = json.loads(path.read_bytes())
    for key in at[:-1]:
        found = found[key]
    found[at[-1]] = value
    shutil.copytree(path.parent, to)
    (to / path.name).write_text(json.dumps(tree, separators=(",", ":")))
    return to


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    import torch

    path = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000001"
    tensors = {f"{state}/a@0": torch.ones(4) for state in ("weight", "exp_avg")}
    shapes = {state: {"a": [2, 2]} for state in ("weight", "exp_avg")}
    store.write_shard(path, 0, "t", Snapshot(tensors, shapes, {"step": 1.0}))
    store.commit(path, 1, "t", TrainState(step=1), {}, 5)
    assert store.verify(path) == []
    return path


LONG = {f"k{i}": "" for i in range(150_000)}
CHECKPOINTS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "losses": (("state", "recent_losses"), [""] * 300_000, "state.recent_losses.0: should be a valid number, not ''"),
    "starved": (("state", "starved"), [[""]] * 200_000, "state.starved.0.0: should be a valid integer, not ''"),
    "routers": (("state", "memory"), LONG, "state.memory: it has 150,000 entries, at most 4,096 are allowed"),
    "loss scale": (("state", "loss_scale"), LONG, "state.loss_scale: it has 150,000 entries"),
    "keys of the state": (("state",), LONG, "state: it has 150,000 entries"),
    "keys of a file": (("files", "rank-00000.safetensors"), LONG, "unknown key 'k0'"),
    "scalars": (("scalars",), LONG, "scalars: it has 150,000 entries, at most 16 are allowed"),
    "files": (("files",), LONG, "files: it has 150,000 entries, at most 100,000 are allowed"),
    "states": (("shapes",), LONG, "shapes: it has 150,000 states of 0 tensors, more than 16"),
    "tensors": (("shapes", "weight"), LONG, "shapes.weight.k0: should be a list, not ''"),
    "dimensions": (("shapes", "weight", "a"), [""] * 500_000, "shapes.weight.a.0: should be a valid integer, not ''"),
    "values": (("config", "x"), [0] * 1_200_000, "it has over 1,048,576 values"),
}


@pytest.mark.slow
def test_manifests_of_checkpoints(saved, tmp_path):
    paths = [
        changed(saved / "manifest.json", tmp_path / name / saved.name, at, value)
        for name, (at, value, _) in CHECKPOINTS.items()
    ]
    for (name, (_, _, told)), said in zip(CHECKPOINTS.items(), read("checkpoint", *paths), strict=True):
        assert told in said, name
        assert len(said) < 500


def fragmented(saved: Path, to: Path, shape: list[int], keys: list[str], numel: int = 1) -> Path:
    """A checkpoint of one tensor whose fragments have these places and so many elements each."""
    entries = (
        f'"weight/a@{key}":{{"dtype":"F32","shape":[{numel}],"data_offsets":[{4 * numel * i},{4 * numel * (i + 1)}]}}'
        for i, key in enumerate(keys)
    )
    head = ("{" + ",".join(entries) + "}").encode()
    data = struct.pack("<Q", len(head)) + head + bytes(4 * numel * len(keys))
    changed(saved / "manifest.json", to, ("shapes",), {"weight": {"a": shape}})
    tree = json.loads((to / "manifest.json").read_text())
    tree["files"] = {"x": {"name": "x", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    (to / "manifest.json").write_text(json.dumps(tree))
    (to / "x").write_bytes(data)
    return to


@pytest.mark.slow
def test_fragments_of_checkpoints(saved, tmp_path):
    """Stretches of one slice that follow each other cost the same in every shape; slices of many corners do not."""
    shape, many = [2, 2, 2, 2, 2, 2500], 80_000
    stretches = [str(i) for i in range(many)]
    slices = [
        "0[" + ",".join(f"{(i // 2500 >> d) % 2}:{(i // 2500 >> d) % 2 + 1}" for d in range(5)) + f",{j}:{j + 1}]"
        for i in range(0, many, 2500)
        for j in range(2500)
    ]
    gaps = [str(2 * i) for i in range(many // 2)]
    cases = [
        fragmented(saved, tmp_path / name / saved.name, of, keys)
        for name, of, keys in (
            ("stretches", shape, stretches), ("slices", shape, slices[:40_000]), ("gaps", shape, gaps),
        )
    ]  # fmt: skip
    whole, too_many, holes = read("checkpoint", *cases)
    assert whole == ""
    assert "cut into slices of over 2,097,152 corners" in too_many
    assert "cut into slices of over 2,097,152 corners" in holes
    assert Reader(cases[0]).read("weight", "a", 77, 9).tolist() == [0.0] * 9


def test_a_manifest_is_read_as_json_says(saved):
    """A number is not a text, nor a truth a number, though the tree is parsed before it is checked."""
    tree = json.loads((saved / "manifest.json").read_text())
    wrong = (("step", True), ("step", 1.0), ("step", "1"), ("recent_losses", ["1"]), ("recent_losses", [True]),
             ("loss_scale", {"cur_scale": "yes"}), ("memory", {"a": [["1"]]}), ("starved", [[1.0]]))  # fmt: skip
    for key, value in wrong:
        text = json.dumps(tree | {"state": tree["state"] | {key: value}}).encode()
        with pytest.raises(CheckpointError, match=rf"state\.{key}"):
            parse_manifest(text, Path("manifest.json"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    folder.mkdir()
    none = SplitStats(documents=0, bytes=0, characters=0, tokens=0, entropy=0.0)
    manifest = Manifest(
        fingerprint="", inputs=[], input_files=0, input_bytes=0, text_key="text", prepare=PrepareConfig(),
        tokenizer=TokenizerInfo(kind="bytes", sha256="0" * 64, vocab_size=257, eos_id=256, eos_token="<|endoftext|>"),
        dtype="uint16", splits={"train": none, "held_out": none}, shards=[], refused={},
    )  # fmt: skip
    write_manifest(folder, manifest)
    assert read("prepared", folder) == [""]
    return folder


PREPARED: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "shards": (("shards",), [0] * 1_000_000, "shards.0: should be keys and their values, not 0"),
    "inputs": (("inputs",), [""] * 2_500_000, "it has over 2,097,152 values"),
    "no inputs": (("inputs",), [0] * 1_000_000, "inputs.0: should be a valid string, not 0"),
    "refused": (("refused",), {f"{i}": 0 for i in range(400_000)}, "refused: it has 400,000 entries"),
    "splits": (("splits",), LONG, "splits: it has 150,000 entries, at most 2 are allowed"),
    "keys": (("tokenizer",), LONG, "tokenizer: unknown key 'k0'"),
}


@pytest.mark.slow
def test_manifests_of_prepared_data(prepared, tmp_path):
    paths = [
        changed(prepared / "manifest.json", tmp_path / name, at, value) for name, (at, value, _) in PREPARED.items()
    ]
    for (name, (_, _, told)), said in zip(PREPARED.items(), read("prepared", *paths), strict=True):
        assert told in said, name
        assert "remove the folder and prepare it again" in said
        assert len(said) < 500


@pytest.mark.slow
def test_plans_of_sweeps(tmp_path):
    plan = {"vocab_size": 64, "open": 0, "warnings": [], "trials": []}
    wrong = {
        "trials.0: should be keys and their values, not 0": {"trials": [0] * 500_000},
        "warnings.0: should be a valid string, not 0": {"warnings": [0] * 500_000},
        "trials.0: unknown key 'k0'": {"trials": [LONG]},
        "unknown key 'k0'": LONG,
    }
    for i, values in enumerate(wrong.values()):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "plan.json").write_text(json.dumps(plan | values))
    for told, said in zip(wrong, read("plan", *(tmp_path / str(i) for i in range(len(wrong)))), strict=True):
        assert told in said
        assert "is not what `muster sweep run` writes" in said


def test_a_message_of_unknown_keys_has_one_error():
    with pytest.raises(BadMessage, match="unknown key 'k0'") as caught:
        parse(json.dumps({"do": "stop", "id": "job-a", "now": True} | LONG).encode())
    assert len(str(caught.value)) < 300


def test_a_folder_is_named_as_it_was_given(tmp_path):
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/x: does not exist"):
        inspect(tmp_path / "x")
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    (tmp_path / "run" / "events.jsonl").touch()
    with pytest.raises(ConfigError, match=r"run is not a complete run: its config\.yaml is missing, or is not a file"):
        run_folder("run", tmp_path)

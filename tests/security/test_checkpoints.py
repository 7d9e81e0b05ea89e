"""A hostile checkpoint is refused in one message, or read as it is: never a traceback, never taken for another.

A hostile writer makes the digests match, so the mutations below do, unless they are of the manifest's own files.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineRun, resume_each, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from support import resolved

from configs import ConfigError, to_yaml
from models.families import build
from trainer.checkpoint import store
from trainer.checkpoint.export import load_module
from trainer.checkpoint.init_from import check_source, load_weights
from trainer.checkpoint.resume import resume
from trainer.checkpoint.save import take_snapshot
from trainer.checkpoint.store import Reader
from trainer.engine.engine import start_processes
from trainer.record.lines import Record, read_events
from trainer.state import TrainState

MODEL = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "num_experts": 2, "expert_size": 8,
         "top_k": 1, "vocab_size": 257, "router_bias_rate": 0.01, "aux_loss_over": "global_batch"}  # fmt: skip
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
SHARD = "rank-00000.safetensors"
Change = Callable[[Path], None]
"""Changes the folder of a checkpoint."""


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_data):
    return resolved(
        run={"name": "run", "root": str(tmp_path_factory.mktemp("runs"))}, data={"path": str(tiny_data)},
        model=MODEL, train={"micro_batch": 4, "precision": "fp32"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(config):
    return EngineRun(config)


@pytest.fixture(scope="module")
def original(config, engine, tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("original") / "run"
    rows = [[0.0, 0.0]]
    for step in (1, 2):
        engine.steps(step, step)
        path = store.folder(run_dir, step)
        store.write_shard(path, 0, "t", take_snapshot(engine.engine))
        state = TrainState(step, 4 * step, 128 * step, recent_losses=[5.0] * step, routers={"bias": rows, "load": rows})
        store.commit(path, 1, "t", state, config.model_dump(mode="json"), 5)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return run_dir


@pytest.fixture
def run_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


# How a checkpoint is changed.


def tree_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def text(content: bytes | str) -> Change:
    """Another text of the manifest."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / "manifest.json").write_bytes(data)


def replaced(old: str, new: str) -> Change:
    """One stretch of the manifest's text is another: what no tree of JSON can say."""

    def change(path: Path) -> None:
        before = (path / "manifest.json").read_text()
        assert before.count(old) >= 1
        (path / "manifest.json").write_text(before.replace(old, new, 1))

    return change


GONE = object()


def manifest(*keys: Any, to: Any) -> Change:
    """A value of the manifest is `to`, or gone, or what `to` makes of it."""

    def change(path: Path) -> None:
        tree = place = tree_of(path)
        for key in keys[:-1]:
            place = place[key]
        if to is GONE:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to
        (path / "manifest.json").write_text(json.dumps(tree))

    return change


def seal(path: Path) -> None:
    """Let the manifest have the sizes and digests of the files as they now are."""
    tree = tree_of(path)
    for name, entry in tree["files"].items():
        data = (path / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(tree))


def content(make: Callable[[bytes], bytes]) -> Change:
    """Another content of the shard."""

    def change(path: Path) -> None:
        (path / SHARD).write_bytes(make((path / SHARD).read_bytes()))
        seal(path)

    return change


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """The shard's header is changed, and the numbers after it are not."""

    def make(data: bytes) -> bytes:
        head, numbers = parts(data)
        return safetensors(edit(head) or head, numbers)

    return content(make)


def entry(key: str, **values: Any) -> Change:
    """Values of one tensor in the shard's header."""
    return header(lambda head: head[key].update(values))


def renamed(old: str, new: str) -> Change:
    """A fragment has another key."""
    return header(lambda head: {new if key == old else key: value for key, value in head.items()})


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """The shard's tensors are changed, and written as safetensors writes them."""

    def change(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(path / SHARD)
        edit(held)
        save_file(held, path / SHARD)
        seal(path)

    return change


def numbers(key: str, value: float) -> Change:
    return tensors(lambda held: held[key].__setitem__(3, value))


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes] and None


def file(make: Callable[[Path], Any], name: str = SHARD) -> Change:
    """Something else stands in a file's place."""

    def change(path: Path) -> None:
        (path / name).rename(path / "aside")
        make(path / name)

    return change


def second_shard(path: Path) -> None:
    """The same shard again, under another name."""
    tree = tree_of(path)
    shutil.copyfile(path / SHARD, path / "rank-00001.safetensors")
    tree["files"]["rank-00001.safetensors"] = tree["files"][SHARD] | {"name": "rank-00001.safetensors"}
    (path / "manifest.json").write_text(json.dumps(tree))


def without(state: str, name: str) -> Change:
    """A tensor is neither in the manifest nor in the shard."""
    return both(manifest("shapes", state, name, to=GONE), tensors(lambda held: held.pop(f"{state}/{name}@0")))


def reshaped(name: str, shape: list[int]) -> Change:
    """The weight and its moments all have another shape, and as many elements in the shard."""

    def change(path: Path) -> None:
        size = int(torch.tensor(shape).prod())
        tensors(lambda held: [held.__setitem__(k, torch.ones(size)) for k in held if k.endswith(f"/{name}@0")])(path)
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            manifest("shapes", state, name, to=shape)(path)

    return change


WEIGHT, MOMENT = f"weight/{EMBED}@0", f"exp_avg_sq/{EMBED}@0"
ELEMENTS = 257 * 32
DAMAGE: dict[str, tuple[Change, str]] = {
    # What is no manifest.
    "empty": (text(""), "manifest.json: Expecting value"),
    "null": (text("null"), "not a manifest"),
    "list": (text("[]"), "not a manifest"),
    "not UTF-8": (text(b'{"format": 2, "\xff\xfe": 1}'), "manifest.json: .*decode"),
    "cut off": (lambda path: os.truncate(path / "manifest.json", 400), "manifest.json: "),
    "1 GB": (lambda path: os.truncate(path / "manifest.json", 1 << 30), "longer than"),
    "deep list": (text("[" * 1_000_000), "nested too deep"),
    "deep mapping": (text('{"a":' * 1_000_000), "nested too deep"),
    "deep config": (replaced('"config": {', '"config": {"a": ' + "[" * 500 + "]" * 500 + ", "), "manifest.json: "),
    "many lists": (text("[" + "[]," * 2_000_000 + "[]]"), "has over 1,048,576 values"),
    "key twice": (replaced('"format"', '"step": 2, "format"'), "'?step'? stands twice"),
    "key twice within": (replaced('"cursor"', '"cursor": 1, "cursor"'), "cursor'? stands twice"),
    "NaN": (replaced('"recent_losses": [5.0', '"recent_losses": [NaN'), "NaN is no JSON number"),
    "Infinity": (replaced('"scalars": {', '"scalars": {"a": Infinity, '), "Infinity is no JSON number"),
    "number of 5000 digits": (replaced('"cursor": 8', '"cursor": ' + "8" * 5000), "manifest.json: "),
    "is a link": (file(lambda path: path.symlink_to("aside"), "manifest.json"), "manifest.json: "),
    "is a pipe": (file(os.mkfifo, "manifest.json"), "manifest.json: not a file"),
    "is a folder": (file(Path.mkdir, "manifest.json"), "manifest.json: not a file"),
    # Its values.
    "no format": (manifest("format", to=GONE), "format None, this version reads"),
    "format of tomorrow": (manifest("format", to=3), "format 3, this version reads"),
    "format is text": (manifest("format", to="2"), "format 2, this version reads"),
    "format is a boolean": (manifest("format", to=True), "format True, this version reads"),
    "format is a list": (manifest("format", to=[2]), "format .2., this version reads"),
    "more keys": (manifest("more", to=1), "there is no key .more."),
    "no step": (manifest("step", to=GONE), "step is missing"),
    "step is text": (manifest("step", to="2"), "step: should be a valid integer"),
    "step is a boolean": (manifest("step", to=True), "step: should be a valid integer"),
    "step is a fraction": (manifest("step", to=2.5), "step: should be a valid integer"),
    "step below 0": (manifest("step", to=-2), "step: should be greater than or equal to 0"),
    "step of 2^63": (manifest("step", to=2**63), "step: should be less than"),
    "step beside the state's": (manifest("step", to=3), "step is 3, state.step is 2"),
    "step beside the folder's": (
        both(manifest("step", to=3), manifest("state", "step", to=3)),
        "is of step 3, and its folder is named",
    ),
    "time is text": (manifest("time", to="now"), "time: should be a valid number"),
    "time without end": (manifest("time", to=1e300), "time: should be less than"),
    "config is a list": (manifest("config", to=[]), "config: should be keys and their values"),
    "no config": (manifest("config", to=GONE), "config is missing"),
    "state is a list": (manifest("state", to=[]), "state: "),
    "no cursor": (manifest("state", "cursor", to=GONE), "state has no cursor"),
    "cursor below 0": (manifest("state", "cursor", to=-1), "state.cursor: should be greater"),
    "cursor of 2^63": (manifest("state", "cursor", to=2**63), "state.cursor: should be less"),
    "cursor is text": (manifest("state", "cursor", to="8"), "state.cursor: should be a valid integer"),
    "cursor is a boolean": (manifest("state", "cursor", to=True), "state.cursor: should be a valid integer"),
    "state of another version": (manifest("state", "bad_pages", to=0), "state.bad_pages: "),
    "rollbacks below 0": (manifest("state", "rollbacks", to=-1), "state.rollbacks: "),
    "losses are text": (manifest("state", "recent_losses", to=["5.0"]), "state.recent_losses.0: "),
    "loss of 1e999": (replaced('"recent_losses": [5.0', '"recent_losses": [1e999'), "state.recent_losses.0: "),
    "loss scale is text": (manifest("state", "loss_scale", to={"cur_scale": "1"}), "state.loss_scale.cur_scale"),
    "loss scale of 1e999": (
        replaced('"loss_scale": null', '"loss_scale": {"cur_scale": 1e999}'),
        "state.loss_scale.cur_scale",
    ),
    "loss scale of 0": (manifest("state", "loss_scale", to={"cur_scale": 0.0}), "cur_scale is 0.0"),
    "no loss scale in it": (manifest("state", "loss_scale", to={}), "cur_scale is None"),
    "routers are text": (manifest("state", "routers", to={"bias": "none"}), "state.routers.bias: "),
    "router's bias of 1e300": (manifest("state", "routers", "bias", to=[[1e300, 0.0]]), "state.routers.bias.0.0: "),
    "starved below 0": (manifest("state", "starved", to=[[-1, 0]]), "state.starved.0.0: "),
    "scalar is text": (manifest("scalars", "step", to="2"), "scalars.step: should be a valid number"),
    "scalar is a list": (manifest("scalars", "step", to=[2.0]), "scalars.step: should be a valid number"),
    "scalar is a boolean": (manifest("scalars", "step", to=True), "scalars.step: should be a valid number"),
    "scalar of 1e999": (replaced('"scalars": {"step": 2.0', '"scalars": {"step": 1e999'), "scalars.step: "),
    "optimizer's step below 0": (manifest("scalars", "step", to=-1.0), "scalars: step is -1.0"),
    "scalar instead of a moment": (manifest("scalars", "exp_avg", to=1.0), "scalars: exp_avg is among shapes too"),
    # Its shapes.
    "no shapes": (manifest("shapes", to={}), "there is no weight"),
    "no weights": (manifest("shapes", "weight", to=GONE), "there is no weight"),
    "shape is text": (manifest("shapes", "weight", EMBED, to="257,32"), "shapes.weight.*should be a list"),
    "size is text": (manifest("shapes", "weight", EMBED, to=["257", 32]), "shapes.weight.*valid integer"),
    "size is a boolean": (manifest("shapes", "weight", NORM, to=[True]), "shapes.weight.*valid integer"),
    "size below 0": (manifest("shapes", "weight", EMBED, to=[-257, -32]), "shapes.weight.*greater than"),
    "ten dimensions": (manifest("shapes", "weight", EMBED, to=[1] * 8 + [257, 32]), "at most 6 items"),
    "shape of another size": (manifest("shapes", "weight", EMBED, to=[1, 32]), "exp_avg of .*, not .1, 32."),
    "10^18 elements": (
        both(*(manifest("shapes", s, EMBED, to=[10**6] * 3) for s in ("weight", "exp_avg", "exp_avg_sq"))),
        f"hold {ELEMENTS} of its {10**18} elements",
    ),
    "no elements": (
        both(*(manifest("shapes", s, EMBED, to=[0, 32]) for s in ("weight", "exp_avg", "exp_avg_sq"))),
        f"has {ELEMENTS} elements, and its slice has room for 0",
    ),
    "a parameter more": (manifest("shapes", "weight", "more", to=[2]), "more has no moments"),
    "a parameter more, of an optimizer without moments": (
        both(
            tensors(lambda held: [held.pop(key) for key in list(held) if not key.startswith("weight/")]),
            manifest("shapes", to=lambda shapes: {"weight": shapes["weight"] | {"more": [2]}}),
        ),
        "hold 0 of its 2 elements",
    ),
    "a parameter less": (
        both(*(manifest("shapes", s, EMBED, to=GONE) for s in ("weight", "exp_avg", "exp_avg_sq"))),
        f"'[a-z_]*/{EMBED}@0' is of no tensor that the manifest names",
    ),
    "a moment of another shape": (manifest("shapes", "exp_avg", EMBED, to=[1, 32]), "exp_avg of .* is .1, 32., not"),
    "a moment of nothing": (manifest("shapes", "exp_avg", "other", to=[2]), "exp_avg of other, which has no weight"),
    "a moment of one parameter gone": (without("exp_avg", NORM), "lacks a moment that others"),
    "both moments of one parameter gone": (
        both(without("exp_avg", NORM), without("exp_avg_sq", NORM)),
        f"{NORM} has no moments, and others have",
    ),
    # Its files.
    "no files": (manifest("files", to={}), "hold 0 of its"),
    "files are a list": (manifest("files", to=[SHARD]), "files: should be keys and their values"),
    "file is text": (manifest("files", SHARD, to=SHARD), "files.*: "),
    "file above": (manifest("files", to=lambda f: {f"../{SHARD}": f[SHARD]}), "outside its folder"),
    "file elsewhere": (manifest("files", to=lambda f: {f"/etc/{SHARD}": f[SHARD]}), "outside its folder"),
    "folder above": (manifest("files", to=lambda f: {"..": f[SHARD]}), "outside its folder"),
    "folder itself": (manifest("files", to=lambda f: {".": f[SHARD]}), "outside its folder"),
    "no name": (manifest("files", to=lambda f: {"": f[SHARD]}), "outside its folder|no plain name"),
    "name with a NUL": (manifest("files", to=lambda f: {"a\0b": f[SHARD]}), "no plain name"),
    "name of 10,000": (manifest("files", to=lambda f: {"a" * 10_000: f[SHARD]}), "no plain name"),
    "name with an escape": (manifest("files", to=lambda f: {"\x1b]52;c;aGk=\x07": f[SHARD]}), "no plain name"),
    "another name within": (manifest("files", SHARD, "name", to="other"), "is named other"),
    "size of a file is text": (manifest("files", SHARD, "bytes", to="9"), "bytes: should be a valid integer"),
    "size of a file below 0": (manifest("files", SHARD, "bytes", to=-1), "bytes: should be greater"),
    "size of 2^63": (manifest("files", SHARD, "bytes", to=2**63), "bytes: should be less"),
    "size of a file is a boolean": (manifest("files", SHARD, "bytes", to=True), "bytes: should be a valid integer"),
    "another size": (manifest("files", SHARD, "bytes", to=9), "bytes, the manifest says 9"),
    "digest is a number": (manifest("files", SHARD, "sha256", to=9), "sha256: should be a valid string"),
    "digest is no digest": (manifest("files", SHARD, "sha256", to="0" * 63), "sha256: String should match"),
    "another digest": (manifest("files", SHARD, "sha256", to="0" * 64), "does not have the manifest's sha256"),
    "no digest": (manifest("files", SHARD, "sha256", to=GONE), "sha256 is missing"),
    "shard twice": (second_shard, "hold an element twice"),
    "shard gone": (lambda path: (path / SHARD).unlink(), "is missing"),
    "shard is a link": (file(lambda path: path.symlink_to("aside")), "no file, or a link"),
    "shard is a link to a device": (file(lambda path: path.symlink_to("/dev/zero")), "no file, or a link"),
    "shard is a pipe": (file(os.mkfifo), "no file, or a link"),
    "shard is a folder": (file(Path.mkdir), "no file, or a link"),
    # The shard's header.
    "shard is empty": (content(lambda _: b""), "not safetensors"),
    "shard of four bytes": (content(lambda data: data[:4]), "not safetensors"),
    "header of 2^60": (content(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), "not safetensors: its header of"),
    "header of 2^64 - 1": (content(lambda data: b"\xff" * 8 + data[8:]), "not safetensors: its header of"),
    "header of 0": (content(lambda data: bytes(8) + data[8:]), "not safetensors"),
    "header is no JSON": (content(lambda data: safetensors(b"\x80\x04K\x01.")), "not safetensors"),
    "header is a list": (content(lambda data: safetensors(b"[]")), "not safetensors"),
    "header is deep": (content(lambda data: safetensors(b'{"a":' * 100_000)), "not safetensors"),
    "header without tensors": (content(lambda data: safetensors({})), "hold 0 of its"),
    "numbers cut off": (content(lambda data: data[:-4]), "not safetensors"),
    "numbers more": (content(lambda data: data + bytes(4)), "not safetensors"),
    "metadata of numbers": (header(lambda head: head | {"__metadata__": {"a": 1}}), "not safetensors"),
    "metadata is a list": (header(lambda head: head | {"__metadata__": []}), "not safetensors"),
    "int8": (
        header(lambda head: head[WEIGHT].update(dtype="I8", shape=[4 * ELEMENTS])),
        f"{WEIGHT} is I8 .*, not one-dimensional F32",
    ),
    "int32": (entry(WEIGHT, dtype="I32"), f"{WEIGHT} is I32 .*, not one-dimensional F32"),
    "bf16": (entry(WEIGHT, dtype="BF16", shape=[2 * ELEMENTS]), f"{WEIGHT} is BF16 .*, not one-dimensional F32"),
    "fp64": (entry(WEIGHT, dtype="F64", shape=[ELEMENTS // 2]), f"{WEIGHT} is F64 .*, not one-dimensional F32"),
    "unknown type": (entry(WEIGHT, dtype="X9"), "not safetensors"),
    "two dimensions": (entry(WEIGHT, shape=[257, 32]), "not one-dimensional F32"),
    "none": (entry(WEIGHT, shape=[]), "not safetensors|not one-dimensional F32"),
    "sizes below 0": (entry(WEIGHT, shape=[-ELEMENTS]), "not safetensors"),
    "10^18 elements there": (entry(WEIGHT, shape=[10**18]), "not safetensors"),
    "2^64 elements there": (entry(WEIGHT, shape=[2**62, 4]), "not safetensors"),
    "offsets that overlap": (
        header(lambda head: head[MOMENT].update(data_offsets=[0, 4 * ELEMENTS])),
        "not safetensors",
    ),
    "offsets beyond": (entry(WEIGHT, data_offsets=[1 << 40, (1 << 40) + 4 * ELEMENTS]), "not safetensors"),
    "offsets reversed": (header(lambda head: head[WEIGHT]["data_offsets"].reverse()), "not safetensors"),
    "offsets below 0": (entry(WEIGHT, data_offsets=[-4 * ELEMENTS, 0]), "not safetensors"),
    "offsets are fractions": (entry(WEIGHT, data_offsets=[0.5, 1.5]), "not safetensors"),
    # Its fragments.
    "key without a place": (renamed(WEIGHT, f"weight/{EMBED}"), "is no fragment's key"),
    "key without a state": (renamed(WEIGHT, f"{EMBED}@0"), "is no fragment's key"),
    "place below 0": (renamed(WEIGHT, f"weight/{EMBED}@-1"), "is no fragment's key"),
    "place of 10^30": (renamed(WEIGHT, f"weight/{EMBED}@{10**30}"), "is no fragment's key"),
    "place of other digits": (renamed(WEIGHT, f"weight/{EMBED}@\u0660"), "is no fragment's key"),
    "place within": (renamed(WEIGHT, f"weight/{EMBED}@1"), f"has room for {ELEMENTS - 1}"),
    "place beyond": (renamed(WEIGHT, f"weight/{EMBED}@{10**15}"), "has room for 0"),
    "slice beyond": (renamed(WEIGHT, f"{WEIGHT}[1:258,0:32]"), "is not within a tensor of .257, 32."),
    "slice reversed": (renamed(WEIGHT, f"{WEIGHT}[257:0,0:32]"), "is not within a tensor of .257, 32."),
    "slice of another dimension": (renamed(WEIGHT, f"{WEIGHT}[0:257]"), "is not within a tensor of .257, 32."),
    "slice of nothing": (renamed(WEIGHT, f"{WEIGHT}[]"), "is no fragment's key"),
    "smaller slice": (renamed(WEIGHT, f"{WEIGHT}[0:1,0:32]"), "has room for 32"),
    "state that is not there": (renamed(WEIGHT, f"weird/{EMBED}@0"), "is of no tensor that the manifest names"),
    "parameter that is not there": (renamed(WEIGHT, "weight/other@0"), "is of no tensor that the manifest names"),
    "a fragment gone": (tensors(lambda held: held.pop(WEIGHT)), f"hold 0 of its {ELEMENTS} elements"),
    "a fragment cut": (
        tensors(lambda held: held.update({WEIGHT: held[WEIGHT][:-5]})),
        f"hold {ELEMENTS - 5} of its {ELEMENTS} elements",
    ),
    "a fragment of nothing": (tensors(lambda held: held.update({WEIGHT: torch.zeros(0)})), "has 0 elements"),
    "fragments that overlap": (
        tensors(lambda held: held.update({f"weight/{EMBED}@{ELEMENTS - 2}": torch.ones(2)})),
        "hold an element twice",
    ),
    "slices that overlap and leave a hole": (
        tensors(
            lambda held: held.update(
                {
                    f"{WEIGHT}[0:200,0:32]": held.pop(WEIGHT)[: 200 * 32],
                    f"{WEIGHT}[143:200,0:32]": torch.ones(57 * 32),
                }
            )
        ),
        "hold an element twice",
    ),
    # Its numbers.
    "NaN in a weight": (numbers(WEIGHT, float("nan")), f"not finite, such as those of {WEIGHT}"),
    "infinity in a weight": (numbers(WEIGHT, float("inf")), "not finite"),
    "infinity in a moment": (numbers(MOMENT, float("-inf")), f"not finite, such as those of {MOMENT}"),
    "a mean of squares below 0": (numbers(MOMENT, -1.0), f"numbers below 0 in {MOMENT}"),
    "NaN as the last of all": (content(lambda data: data[:-4] + b"\xff\xff\xff\x7f"), "not finite"),
}
MISFITS: dict[str, tuple[Change, str]] = {
    "another shape": (reshaped(EMBED, [1, 32]), "is .1, 32., the model's is .257, 32."),
    "transposed": (reshaped(EMBED, [32, 257]), "is .32, 257., the model's is .257, 32."),
    "another name": (
        both(
            *(renamed(f"{s}/{NORM}@0", f"{s}/other@0") for s in ("weight", "exp_avg", "exp_avg_sq")),
            *(
                manifest("shapes", s, to=lambda shapes: {("other" if n == NORM else n): v for n, v in shapes.items()})
                for s in ("weight", "exp_avg", "exp_avg_sq")
            ),
        ),
        f"holds no weight of {NORM}",
    ),
    "a parameter more": (
        both(
            tensors(
                lambda held: held.update({f"{s}/more@0": torch.ones(2) for s in ("weight", "exp_avg", "exp_avg_sq")})
            ),
            *(manifest("shapes", s, "more", to=[2]) for s in ("weight", "exp_avg", "exp_avg_sq")),
        ),
        "has 1 parameter that the model has not, such as more",
    ),
    "a layer of routers more": (manifest("state", "routers", "bias", to=[[0.0] * 2] * 2), "bias is not of the model's"),
    "an expert more": (manifest("state", "routers", "load", to=[[0.5] * 3]), "load is not of the model's 1 MoE layers"),
    "an expert more in one row": (
        manifest("state", "starved", to=[[0, 0, 0]]),
        "starved is not of the model's 1 MoE layers of 2 experts",
    ),
    "another memory": (manifest("state", "routers", "more", to=[[0.0] * 2]), "state.routers has more"),
}
"""What is whole, and not the model's."""
OPTIMIZERS: dict[str, tuple[Change, str]] = {
    "no second moments": (
        both(
            manifest("shapes", "exp_avg_sq", to=GONE),
            tensors(lambda held: [held.pop(key) for key in list(held) if key.startswith("exp_avg_sq/")]),
        ),
        "the optimizer goes on from exp_avg, exp_avg_sq, step",
    ),
    "no step": (manifest("scalars", "step", to=GONE), "the optimizer goes on from exp_avg, exp_avg_sq, step"),
}
"""What is whole, and not the optimizer's; who wants the weights alone takes it."""
HARMLESS: dict[str, Change] = {
    "the first format": manifest("format", to=1),
    "spaces": lambda path: (path / "manifest.json").write_text(json.dumps(tree_of(path), indent=3) + "\n\n"),
    "metadata": header(lambda head: {"__metadata__": {"format": "pt"}} | head),
    "header in another order": header(lambda head: dict(reversed(head.items()))),
    "in two slices": tensors(
        lambda held: held.update({
            f"{WEIGHT}[0:257,0:16]": held[WEIGHT].view(257, 32)[:, :16].reshape(-1),
            f"{WEIGHT}[0:257,16:32]": held.pop(WEIGHT).view(257, 32)[:, 16:].reshape(-1),
        })
    ),
    "a hard link": lambda path: os.link(path / SHARD, path / "other"),
    "no routers": manifest("state", "routers", to=GONE),
}  # fmt: skip


def states(reader: Reader) -> dict[tuple[str, str], torch.Tensor]:
    return {(key, name): reader.read(key, name) for key in reader.states for name in reader.manifest.shapes[key]}


def resumed(run_dir: Path, engine: EngineRun, config: Any) -> int:
    """Resume a run. Returns the step that it goes on from."""
    state, record = TrainState(), Record(run_dir, 1)
    try:
        resume(run_dir, engine.engine, state, config.model, record)
    finally:
        record.close()
    return state.step


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_message_and_a_run_goes_on_from_the_checkpoint_before(run_dir, engine, config, name):
    change, problem = DAMAGE[name]
    path = store.folder(run_dir, 2)
    assert store.verify(path) == []
    change(path)
    assert_refused(run_dir, path, problem)
    assert resumed(run_dir, engine, config) == 1
    assert not path.exists()
    refused = [event for event in read_events(run_dir) if event["event"] == "checkpoint_refused"]
    assert [(event["step"], event["kept_as"]) for event in refused] == [(2, "step-00000002.refused")]


def assert_refused(run_dir: Path, path: Path, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)no checkpoint of .* can be used: .*{problem}") as refused:
        load_module(run_dir, 2)
    lines = str(refused.value)
    assert lines.count("\n") < 3
    assert len(lines) < 1000
    assert lines.isprintable()
    source = resolved(model=MODEL, train={"init_from": str(path)})
    for use in (check_source, lambda config: load_weights(build(config.model), config)):
        if use is check_source and any(words in problem for words in ("sha256", "not finite", "below 0")):
            continue  # the content is read when it is loaded
        with pytest.raises(ConfigError, match=r"train\.init_from"):
            use(source)


@pytest.mark.parametrize("name", MISFITS)
def test_what_is_another_models_is_refused_too(run_dir, engine, config, name):
    change, problem = MISFITS[name]
    path = store.folder(run_dir, 2)
    change(path)
    assert store.verify(path) == []
    with pytest.raises(ConfigError, match=problem):
        load_module(run_dir, 2)
    assert load_module(run_dir)[2] == 1
    assert resumed(run_dir, engine, config) == 1
    assert not path.exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_another_optimizers_is_refused_by_a_run_only(run_dir, engine, config, name):
    change, problem = OPTIMIZERS[name]
    path = store.folder(run_dir, 2)
    change(path)
    assert load_module(run_dir)[2] == 2
    assert resumed(run_dir, engine, config) == 1
    shutil.rmtree(run_dir / "checkpoints" / "step-00000001")
    (run_dir / "checkpoints" / "step-00000002.refused").rename(path)
    with pytest.raises(ConfigError, match=rf"does not fit the model: .*{problem}"):
        resumed(run_dir, engine, config)
    assert path.exists()  # whole: the model may come back


@pytest.mark.parametrize("name", HARMLESS)
def test_what_means_the_same_is_read_as_the_same(original, run_dir, engine, config, name):
    path = store.folder(run_dir, 2)
    HARMLESS[name](path)
    assert store.verify(path) == []
    first, second = states(Reader(store.folder(original, 2))), states(Reader(path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed(run_dir, engine, config) == 2


@pytest.mark.parametrize("parallel", [{"dp": 2, "zero_stage": 3}, {"pp": 2, "zero_stage": 1}])
def test_processes_that_share_the_check_go_on_from_one_checkpoint(pair, tmp_path, parallel):
    """Also where only one of them has read what is wrong, or none has all of the model's names."""
    config = resolved(
        model=MODEL | {"num_layers": 2, "router_bias_rate": None}, parallel=parallel,
        train={"micro_batch": 1, "global_batch": 4, "precision": "fp32"},
    )  # fmt: skip
    pair(write_run, config, tmp_path / "run")
    second = "rank-00001.safetensors"

    def last_number(path: Path) -> None:
        (path / second).write_bytes((path / second).read_bytes()[:-4] + b"\xff\xff\xff\x7f")
        seal(path)

    changes: dict[str, Change] = {
        "whole": lambda path: None,
        "not finite": last_number,
        "gone": lambda path: (path / second).unlink(),
        "cut": content(lambda data: data[:-4]),
        "more": MISFITS["a parameter more"][0],
        "state": manifest("state", "starved", to=[[0]]),
    }
    run_dirs = [shutil.copytree(tmp_path / "run", tmp_path / name) for name in changes]
    for run_dir, change in zip(run_dirs, changes.values(), strict=True):
        change(store.folder(run_dir, 2))
    assert pair(resume_each, config, run_dirs) == [[2, 1, 1, 1, 1, 1]] * 2
    assert [store.committed(run_dir) for run_dir in run_dirs] == [[1, 2], *[[1]] * 5]


def test_a_step_that_is_not_finite_leaves_no_checkpoint_that_is_refused(run_dir, engine, config):
    """The promise above rests on this: a step that would make such numbers is skipped."""
    run = EngineRun(config)
    run.steps(1, 1)
    before = take_snapshot(run.engine)
    for parameter in run.engine.module.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    run.steps(2, 3)
    after = take_snapshot(run.engine)
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)
    path = store.folder(run_dir, 3)
    store.write_shard(path, 0, "t", after)
    store.commit(path, 1, "t", TrainState(step=3), {}, 5)
    assert store.verify(path) == []


def test_folders_of_other_names_are_no_checkpoints(run_dir):
    for name in ("step-\u00b2", "step-3", "step-000000002", "step-", "step--1", f"step-{'9' * 5000}"[:200]):
        shutil.copytree(store.folder(run_dir, 2), run_dir / "checkpoints" / name)
    assert store.committed(run_dir) == [1, 2]


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.symlink_to("/"), Path.mkdir])
def test_what_stands_where_a_refused_one_goes_makes_room(run_dir, engine, config, make):
    make(run_dir / "checkpoints" / "step-00000002.refused")
    (store.folder(run_dir, 2) / "manifest.json").write_text("{")
    assert resumed(run_dir, engine, config) == 1
    assert (run_dir / "checkpoints" / "step-00000002.refused" / SHARD).is_file()


@pytest.mark.parametrize("origin", ["", "\0", "/nowhere", "\x1b]0;x\x07", "x" * 10_000, "/dev/stdin"])
def test_a_fork_from_what_is_no_checkpoint_is_refused(run_dir, engine, config, origin):
    shutil.rmtree(run_dir / "checkpoints")
    Record(run_dir, 0).event("forked", checkpoint=origin)
    with pytest.raises(ConfigError, match=r"the checkpoint this run was forked from cannot be used"):
        resumed(run_dir, engine, config)


@pytest.mark.parametrize("change", [text("null"), manifest("state", "cursor", to=-1), numbers(WEIGHT, float("nan"))])
def test_commands_say_it_in_one_message(muster, run_dir, tmp_path, change):
    path = store.folder(run_dir, 2)
    change(path)
    at = ("--step", "2", "--root", str(run_dir.parent))
    content = change is not None and store.verify(path, digests=False) == []
    for command in ("show", "generate", "eval", "export"):
        options = {"generate": ["--prompt", "a"], "export": ["--to", str(tmp_path / "out")]}.get(command, [])
        words = ["checkpoint", command] if command == "show" else [command]
        code, out, err = muster(*words, "run", *options, *at)
        if command == "show" and content:
            assert code == 0  # it reads no numbers
        else:
            assert (code, err.count("\n") <= 3, "Traceback" in err) == (2, True, False), (command, err)
    code, out, _ = muster("checkpoint", "list", "run", "--root", str(run_dir.parent))
    assert (code, "damaged: " in out) == (0, not content)
    code, out, _ = muster("checkpoint", "verify", "run", "--root", str(run_dir.parent))
    assert (code, out.count("damaged: ")) == (1, 1)


# Any bytes.


@pytest.fixture(scope="module")
def playground(original, tmp_path_factory):
    """A checkpoint to be changed again and again, and what it holds."""
    path = tmp_path_factory.mktemp("any") / "step-00000002"
    shutil.copytree(store.folder(original, 2), path)
    return path, states(Reader(path))


EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.integers(0, 6), st.binary(max_size=6) | st.sampled_from(
        [b"-", b"9" * 30, b"null", b"NaN", b"[", b"{", b'"', b"1e999", b"true", b"\\u0000", b"\xff", b"@", b":"]
    )),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(where=st.sampled_from(["manifest", "header"]), edits=EDITS)
def test_any_other_bytes_are_the_same_tensors_or_refused(playground, where, edits):
    path, held = playground
    files = {name: (path / name).read_bytes() for name in ("manifest.json", SHARD)}
    try:
        data = bytearray(files["manifest.json"])
        if where == "header":
            (length,) = struct.unpack_from("<Q", files[SHARD])
            data = bytearray(files[SHARD][8 : 8 + length])
        for at, gone, added in edits:
            at %= len(data) + 1
            data[at : at + gone] = added
        if where == "manifest":
            (path / "manifest.json").write_bytes(data)
        else:
            (path / SHARD).write_bytes(safetensors(bytes(data), files[SHARD][8 + length :]))
            seal(path)
        problems = store.verify(path)
        assert all(problem.isprintable() and len(problem) < 1000 for problem in problems)
        if not problems:
            found = states(Reader(path))
            assert all(torch.equal(found[key], held[key]) for key in found)
            assert found.keys() == held.keys()
    finally:
        for name, content in files.items():
            (path / name).write_bytes(content)


# Bombs.

BOMBS = """
import resource, sys, time
from pathlib import Path
from trainer import checkpoint

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10

checkpoint.verify(Path(sys.argv[1]))
room = 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room,) * 2)
for path in sys.argv[2:]:
    began = time.process_time()
    problems = checkpoint.verify(Path(path))
    print(f"{time.process_time() - began:.2f} {problems[0] if problems else 'taken'}"[:200])
"""


def many(count: int, shape: str, size: int) -> bytes:
    """A header of many fragments, without their numbers' bytes."""
    entries = (
        f'"weight/{EMBED}@{i}":{{"dtype":"F32","shape":{shape},"data_offsets":[{size * i},{size * i + size}]}}'
        for i in range(count)
    )
    return ("{" + ",".join(entries) + "}").encode()


def sparse(path: Path) -> None:
    """A file of a TB that takes no room on the disk."""
    with (path / SHARD).open("r+b") as shard:
        shard.truncate(1 << 40)
    manifest("files", SHARD, "bytes", to=1 << 40)(path)


BIG: dict[str, Change] = {
    "manifest of 1 GB": lambda path: os.truncate(path / "manifest.json", 1 << 30),
    "manifest 10^6 deep": text("[" * 1_000_000),
    "manifest of lists": text("[" + "[]," * 5_000_000 + "[]]"),
    "manifest of mappings": text("[" + '{"a":1},' * 1_800_000 + "{}]"),
    "manifest of numbers": text("[" + "1234," * 3_000_000 + "0]"),
    "manifest of scalars": manifest("scalars", to={f"{i}": 0.5 for i in range(200_000)}),
    "manifest of 50,000 files": manifest(
        "files", to=lambda files: {f"{i}": files[SHARD] | {"name": f"{i}"} for i in range(50_000)}
    ),
    "manifest of states": manifest(
        "shapes", to=lambda shapes: shapes | {f"{i}": {f"{j}": [2] for j in range(300)} for i in range(400)}
    ),
    "shapes of 10^108": manifest("shapes", to={"weight": {f"{i}": [2**53] * 6 for i in range(50_000)}}),
    "header of 2^60": content(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "header of 20 MB": content(lambda data: struct.pack("<Q", 20 << 20) + bytes(20 << 20)),
    "header of empty fragments": content(lambda data: safetensors(many(60_000, "[0]", 0))),
    "header of metadata": content(
        lambda data: safetensors(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(600_000)) + b"}}")
    ),
    "header of spaces": content(lambda data: safetensors(b"{}" + b" " * (15 << 20))),
    "file of 1 TB": sparse,
}


def test_bombs_take_neither_long_nor_much_memory(original, tmp_path):
    """In a process that may take 500 MB more than it has at the start, so that more is an error.

    Seconds of the processor, each under 2 where it is free; three times that, as cores are shared and differ.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    whole = store.folder(original, 2)
    paths = []
    for number, change in enumerate(BIG.values()):
        paths.append(tmp_path / f"{number}" / whole.name)
        shutil.copytree(whole, paths[-1])
        change(paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(whole), *map(str, paths)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = dict(zip(BIG, done.stdout.splitlines(), strict=True))
    assert {name: line for name, line in lines.items() if line.endswith("taken")} == {}
    assert {name: line for name, line in lines.items() if float(line.split()[0]) > 6} == {}

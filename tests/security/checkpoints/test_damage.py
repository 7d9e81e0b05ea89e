"""A damaged checkpoint is refused in one message, and a run goes on from the one before it."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import (
    ELEMENTS,
    EMBED,
    GONE,
    MODEL,
    MOMENT,
    NORM,
    SHARD,
    WEIGHT,
    Change,
    both,
    content,
    entry,
    file,
    header,
    manifest,
    numbers,
    renamed,
    replaced,
    safetensors,
    tensors,
    text,
    tree_of,
)
from support import resolved

from configs import ConfigError
from models.families import build
from models.tasks.language_modelling import BIAS
from trainer.checkpoint import store
from trainer.checkpoint.export import load_module
from trainer.checkpoint.init_from import check_source, load_weights
from trainer.checkpoint.manifest import folder
from trainer.record.lines import read_events


def second_shard(path: Path) -> None:
    """The same shard again, under another name."""
    tree = tree_of(path)
    shutil.copyfile(path / SHARD, path / "rank-00001.safetensors")
    tree["files"]["rank-00001.safetensors"] = tree["files"][SHARD] | {"name": "rank-00001.safetensors"}
    (path / "manifest.json").write_text(json.dumps(tree))


def without(state: str, name: str) -> Change:
    """A tensor is neither in the manifest nor in the shard."""
    return both(manifest("shapes", state, name, to=GONE), tensors(lambda held: held.pop(f"{state}/{name}@0")))


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
    "key twice": (replaced('"format"', '"step": 2, "format"'), "duplicate key '?step'?"),
    "key twice within": (replaced('"cursor"', '"cursor": 1, "cursor"'), "duplicate key '?cursor'?"),
    "NaN": (replaced('"recent_losses": [5.0', '"recent_losses": [NaN'), "NaN is not a JSON number"),
    "Infinity": (replaced('"scalars": {', '"scalars": {"a": Infinity, '), "Infinity is not a JSON number"),
    "number of 5000 digits": (replaced('"cursor": 8', '"cursor": ' + "8" * 5000), "manifest.json: "),
    "is a link": (file(lambda path: path.symlink_to("aside"), "manifest.json"), "manifest.json: "),
    "is a pipe": (file(os.mkfifo, "manifest.json"), "manifest.json: not a file"),
    "is a folder": (file(Path.mkdir, "manifest.json"), "manifest.json: not a file"),
    # Its values.
    "no format": (manifest("format", to=GONE), "format None, but this version reads"),
    "format of tomorrow": (manifest("format", to=3), "format 3, but this version reads"),
    "format is text": (manifest("format", to="2"), "format 2, but this version reads"),
    "format is a boolean": (manifest("format", to=True), "format True, but this version reads"),
    "format is a list": (manifest("format", to=[2]), "format .2., but this version reads"),
    "more keys": (manifest("more", to=1), "unknown key .more."),
    "no step": (manifest("step", to=GONE), "step is missing"),
    "step is text": (manifest("step", to="2"), "step: should be a valid integer"),
    "step is a boolean": (manifest("step", to=True), "step: should be a valid integer"),
    "step is a fraction": (manifest("step", to=2.5), "step: should be a valid integer"),
    "step below 0": (manifest("step", to=-2), "step: should be greater than or equal to 0"),
    "step of 2^63": (manifest("step", to=2**63), "step: should be less than"),
    "step beside the state's": (manifest("step", to=3), "step is 3, but state.step is 2"),
    "step beside the folder's": (
        both(manifest("step", to=3), manifest("state", "step", to=3)),
        "is for step 3, but its folder is named",
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
    "routers are text": (manifest("state", "memory", to={"router.bias": "none"}), "state.memory.router.bias: "),
    "router's bias of 1e300": (manifest("state", "memory", BIAS, to=[[1e300, 0.0]]), f"state.memory.{BIAS}.0.0: "),
    "starved below 0": (manifest("state", "starved", to=[[-1, 0]]), "state.starved.0.0: "),
    "scalar is text": (manifest("scalars", "step", to="2"), "scalars.step: should be a valid number"),
    "scalar is a list": (manifest("scalars", "step", to=[2.0]), "scalars.step: should be a valid number"),
    "scalar is a boolean": (manifest("scalars", "step", to=True), "scalars.step: should be a valid number"),
    "scalar of 1e999": (replaced('"scalars": {"step": 2.0', '"scalars": {"step": 1e999'), "scalars.step: "),
    "optimizer's step below 0": (manifest("scalars", "step", to=-1.0), "scalars: step is -1.0"),
    "scalar instead of a moment": (manifest("scalars", "exp_avg", to=1.0), "scalars: exp_avg is also in shapes"),
    # Its shapes.
    "no shapes": (manifest("shapes", to={}), "weight is missing"),
    "no weights": (manifest("shapes", "weight", to=GONE), "weight is missing"),
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
        f"has {ELEMENTS} elements, but its slice has room for 0",
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
        f"'[a-z_]*/{EMBED}@0' belongs to no tensor in the manifest",
    ),
    "a moment of another shape": (manifest("shapes", "exp_avg", EMBED, to=[1, 32]), "exp_avg of .* is .1, 32., not"),
    "a moment of nothing": (manifest("shapes", "exp_avg", "other", to=[2]), "exp_avg of other, which has no weight"),
    "a moment of one parameter gone": (without("exp_avg", NORM), "lacks a moment that others"),
    "both moments of one parameter gone": (
        both(without("exp_avg", NORM), without("exp_avg_sq", NORM)),
        f"{NORM} has no moments, but others have",
    ),
    "an average of one parameter alone": (
        manifest("shapes", to=lambda shapes: shapes | {"ema": {NORM: shapes["weight"][NORM]}}),
        "has no ema, but others have",
    ),
    # Its files.
    "no files": (manifest("files", to={}), "hold 0 of its"),
    "files are a list": (manifest("files", to=[SHARD]), "files: should be keys and their values"),
    "file is text": (manifest("files", SHARD, to=SHARD), "files.*: "),
    "file above": (manifest("files", to=lambda f: {f"../{SHARD}": f[SHARD]}), "outside its folder"),
    "file elsewhere": (manifest("files", to=lambda f: {f"/etc/{SHARD}": f[SHARD]}), "outside its folder"),
    "folder above": (manifest("files", to=lambda f: {"..": f[SHARD]}), "outside its folder"),
    "folder itself": (manifest("files", to=lambda f: {".": f[SHARD]}), "outside its folder"),
    "no name": (manifest("files", to=lambda f: {"": f[SHARD]}), "outside its folder|not a plain file name"),
    "name with a NUL": (manifest("files", to=lambda f: {"a\0b": f[SHARD]}), "not a plain file name"),
    "name of 10,000": (manifest("files", to=lambda f: {"a" * 10_000: f[SHARD]}), "not a plain file name"),
    "name with an escape": (manifest("files", to=lambda f: {"\x1b]52;c;aGk=\x07": f[SHARD]}), "not a plain file name"),
    "another name within": (manifest("files", SHARD, "name", to="other"), "has the name other"),
    "size of a file is text": (manifest("files", SHARD, "bytes", to="9"), "bytes: should be a valid integer"),
    "size of a file below 0": (manifest("files", SHARD, "bytes", to=-1), "bytes: should be greater"),
    "size of 2^63": (manifest("files", SHARD, "bytes", to=2**63), "bytes: should be less"),
    "size of a file is a boolean": (manifest("files", SHARD, "bytes", to=True), "bytes: should be a valid integer"),
    "another size": (manifest("files", SHARD, "bytes", to=9), "bytes, but the manifest says 9"),
    "digest is a number": (manifest("files", SHARD, "sha256", to=9), "sha256: should be a valid string"),
    "digest is no digest": (manifest("files", SHARD, "sha256", to="0" * 63), "sha256: String should match"),
    "another digest": (manifest("files", SHARD, "sha256", to="0" * 64), "does not match the manifest's sha256"),
    "no digest": (manifest("files", SHARD, "sha256", to=GONE), "sha256 is missing"),
    "shard twice": (second_shard, "hold an element twice"),
    "shard gone": (lambda path: (path / SHARD).unlink(), "is missing"),
    "shard is a link": (file(lambda path: path.symlink_to("aside")), "not a plain file, or is a link"),
    "shard is a link to a device": (file(lambda path: path.symlink_to("/dev/zero")), "not a plain file, or is a link"),
    "shard is a pipe": (file(os.mkfifo), "not a plain file, or is a link"),
    "shard is a folder": (file(Path.mkdir), "not a plain file, or is a link"),
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
    "key without a place": (renamed(WEIGHT, f"weight/{EMBED}"), "is not a valid fragment key"),
    "key without a state": (renamed(WEIGHT, f"{EMBED}@0"), "is not a valid fragment key"),
    "place below 0": (renamed(WEIGHT, f"weight/{EMBED}@-1"), "is not a valid fragment key"),
    "place of 10^30": (renamed(WEIGHT, f"weight/{EMBED}@{10**30}"), "is not a valid fragment key"),
    "place of other digits": (renamed(WEIGHT, f"weight/{EMBED}@\u0660"), "is not a valid fragment key"),
    "place within": (renamed(WEIGHT, f"weight/{EMBED}@1"), f"has room for {ELEMENTS - 1}"),
    "place beyond": (renamed(WEIGHT, f"weight/{EMBED}@{10**15}"), "has room for 0"),
    "slice beyond": (renamed(WEIGHT, f"{WEIGHT}[1:258,0:32]"), "lies outside its tensor of shape .257, 32."),
    "slice reversed": (renamed(WEIGHT, f"{WEIGHT}[257:0,0:32]"), "lies outside its tensor of shape .257, 32."),
    "slice of another dimension": (renamed(WEIGHT, f"{WEIGHT}[0:257]"), "lies outside its tensor of shape .257, 32."),
    "slice of nothing": (renamed(WEIGHT, f"{WEIGHT}[]"), "is not a valid fragment key"),
    "smaller slice": (renamed(WEIGHT, f"{WEIGHT}[0:1,0:32]"), "has room for 32"),
    "state that is not there": (renamed(WEIGHT, f"weird/{EMBED}@0"), "belongs to no tensor in the manifest"),
    "parameter that is not there": (renamed(WEIGHT, "weight/other@0"), "belongs to no tensor in the manifest"),
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


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_message_and_a_run_goes_on_from_the_checkpoint_before(run_dir, resumed, name):
    change, problem = DAMAGE[name]
    path = folder(run_dir, 2)
    assert store.verify(path) == []
    change(path)
    assert_refused(run_dir, path, problem)
    assert resumed(run_dir) == 1
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

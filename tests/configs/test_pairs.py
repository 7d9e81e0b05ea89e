"""Families, tasks and kinds of data that do not fit are refused alike by every command, without torch."""

import subprocess
import sys
from itertools import product

import pytest

from configs import ConfigError, from_dict, resolve
from configs.sections.pairs import FAMILY_ENDS, TASK_ENDS
from models.families import FAMILIES
from models.tasks.table import TASKS

FIT = {
    ("decoder", "language_modelling"): {None: "tokens"},
    ("recurrent", "language_modelling"): {None: "tokens"},
    ("encoder_decoder", "sequence_to_sequence"): {None: "pairs"},
    ("convnet", "classification"): {None: "images", "images": "images"},
    ("mlp", "classification"): {None: "rows", "rows": "rows", "images": "images"},
    ("mlp", "regression"): {None: "rows", "rows": "rows"},
    ("encoder", "masked_language_modelling"): {None: "masked tokens"},
    ("encoder", "classification"): {None: "texts"},
    ("encoder", "regression"): {None: "texts"},
    ("recurrent", "classification"): {None: "texts"},
    ("recurrent", "regression"): {None: "texts"},
    ("vit", "classification"): {None: "images", "images": "images"},
    ("autoencoder", "reconstruction"): {None: "rows", "rows": "rows", "images": "images"},
    ("diffusion", "denoising"): {None: "images", "images": "images"},
    ("neural_ode", "classification"): {None: "rows", "rows": "rows", "images": "images"},
    ("neural_ode", "regression"): {None: "rows", "rows": "rows"},
    ("gnn", "classification"): {None: "graphs", "graphs": "graphs", "nodes": "nodes"},
    ("gnn", "regression"): {None: "graphs", "graphs": "graphs"},
    ("convnet", "contrastive"): {None: "images", "images": "images"},
    ("mlp", "contrastive"): {None: "images", "images": "images"},
    ("vit", "contrastive"): {None: "images", "images": "images"},
    ("convnet", "self_distillation"): {None: "images", "images": "images"},
    ("mlp", "self_distillation"): {None: "images", "images": "images"},
    ("vit", "self_distillation"): {None: "images", "images": "images"},
    ("mae", "masked_reconstruction"): {None: "images", "images": "images"},
    ("gan", "adversarial"): {None: "images", "images": "images"},
    ("latent_ode", "series_reconstruction"): {None: "series"},
    ("dual_encoder", "image_text_contrastive"): {None: "captions"},
}
"""What each pair learns from, by `data.kind`; all others are refused."""
OURS = list(dict.fromkeys(family for family, _ in FIT)), list(dict.fromkeys(task for _, task in FIT))


def config(family, task, kind=None, path="x.parquet"):
    model = {"family": family} | ({"vocab_size": 64} if "vocab_size" in FAMILIES[family].section.model_fields else {})
    if family in ("encoder", "recurrent") and task in ("classification", "regression"):
        model |= {"outputs": 3}
    model |= {"vit": {}} if family == "dual_encoder" else {}
    return from_dict({"model": model, "task": task, "data": {"kind": kind, "path": path}})


@pytest.mark.parametrize(("family", "task", "kind"), list(product(*OURS, (None, "rows", "images", "graphs", "nodes"))))
def test_every_pair(family, task, kind):
    asked = config(family, task, kind)
    if kind in (fitting := FIT.get((family, task), {})):
        assert TASKS[task].kind(resolve(asked)[0]) == fitting[kind]
        return
    with pytest.raises(ConfigError) as refused:
        resolve(asked)
    said = str(refused.value)
    if not fitting:
        assert said.startswith(f"task={task} needs a network from ")
        for key, value in [pair for each in FIT for pair in (("model.family", each[0]), ("task", each[1]))]:
            fits = (value, task) in FIT if key == "model.family" else (family, value) in FIT
            fits = fits and value != family
            assert (f"{key}={value}" in said.partition(": set ")[2].split(" or ")) == fits
    else:
        assert said.startswith(f"data.kind={kind}: model.family={family} with task={task} learns from ")


@pytest.mark.parametrize(
    ("family", "task", "keys", "said"),
    [
        ("encoder", "classification", {}, r"^model\.outputs is not set: set it to the number of classes"),
        ("recurrent", "regression", {}, r"^model\.outputs is not set"),
        (
            "encoder",
            "masked_language_modelling",
            {"outputs": 3},
            r"^model\.outputs=3 .* leave it out, or set task=",
        ),
        ("recurrent", "language_modelling", {"bidirectional": True}, r"to logits of .*: set task=masked_language_"),
        ("recurrent", "masked_language_modelling", {}, r"^task=masked_language_modelling needs a network from tokens"),
    ],
)
def test_keys_that_make_it_another_network(family, task, keys, said):
    with pytest.raises(ConfigError, match=said):
        resolve(from_dict({"model": {"family": family, "vocab_size": 64} | keys, "task": task, "data": {"path": "x"}}))


def test_the_keys_decide_the_default_task():
    for keys, task in (
        ({"family": "encoder"}, "masked_language_modelling"),
        ({"family": "encoder", "outputs": 2}, "classification"),
        ({"family": "recurrent", "bidirectional": True}, "masked_language_modelling"),
        ({"family": "recurrent", "bidirectional": True, "outputs": 2}, "classification"),
    ):
        assert from_dict({"model": keys}).task == task


def test_the_tables_agree():
    assert set(OURS[0]) <= FAMILY_ENDS.keys()
    assert set(OURS[1]) <= TASK_ENDS.keys()
    for names, table, ends in ((OURS[0], FAMILIES, FAMILY_ENDS), (OURS[1], TASKS, TASK_ENDS)):
        assert {name: (table[name].takes, table[name].gives) for name in names} == {n: ends[n] for n in names}


@pytest.mark.parametrize(("family", "kind"), [("convnet", None), ("mlp", None), ("mlp", "images")])
def test_text_is_not_for_them(family, kind):
    what = FIT[family, "classification"][kind]
    with pytest.raises(ConfigError, match=rf"^data\.path=stdlib is text, but task=classification learns from {what}"):
        resolve(config(family, "classification", kind, "stdlib"))


@pytest.mark.parametrize(
    ("family", "task", "path", "said"),
    [
        ("mlp", "regression", "bundled:digits", "data.path=bundled:digits has images, but task=regression learns from"),
        ("convnet", "classification", "bundled:wine", "data.path=bundled:wine has rows, but task=classification"),
        ("decoder", "language_modelling", "bundled:xor", "data.path=bundled:xor has rows, but task=language_modelling"),
        (
            "encoder_decoder",
            "sequence_to_sequence",
            "stdlib",
            "data.path=stdlib is text, but task=sequence_to_seq",
        ),
        ("mlp", "classification", "bundled:wein", "data.path=bundled:wein: no such path; did you mean bundled:wine?"),
    ],
)
def test_packaged_data_of_another_kind(family, task, path, said):
    with pytest.raises(ConfigError) as refused:
        resolve(config(family, task, path=path))
    assert str(refused.value).startswith(said)


def test_a_run_of_data_that_are_not_packaged_is_told_a_name(muster, tmp_path):
    code, _, err = muster("train", "wine", "data.path=bundled:wein", f"run.root={tmp_path}")
    assert (code, err) == (2, "muster: data.path=bundled:wein: no such path; did you mean bundled:wine?\n")


COMMANDS = ("config", "plan", "train", "submit")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["task=classification"],
            "task=classification needs a network from rows or images or graphs or nodes or texts to classes, but",
        ),
        (["model={family: mlp}", "data.kind=images", "task=regression"], "data.kind=images: model.family=mlp with"),
        (["model={family: convnet}"], "data.path=stdlib is text, but task=classification learns from images"),
    ],
    ids=["task", "kind", "text"],
)
def test_every_command_refuses_it(muster, tmp_path, command, keys, said):
    code, out, err = muster(command, "moe-8x7b", "data.path=stdlib", f"run.root={tmp_path}", *keys)
    assert (code, out) == (2, "")
    assert err.startswith(f"muster: {said}")


def test_that_takes_no_torch():
    code = (
        "import sys; from configs import ConfigError, load, resolve\n"
        "try: resolve(load('quickstart', ['task=regression']))\n"
        "except ConfigError as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("task=regression needs")
    assert done.stdout.endswith("False\n")

"""What is derived from a config, what is refused as a whole, and what a run may change between attempts."""

from typing import get_args

import pytest

from configs import Config, ConfigError, differences, flatten, from_dict, load, resolve, with_workers, worker_counts
from configs.sections.optim import OPTIMIZERS, OptimConfig


def made(**sections):
    tree = {"model": {"vocab_size": 320, "hidden_size": 48, "num_heads": 4}, "train": {"precision": "fp32"}}
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys if isinstance(keys, dict) else keys
    return from_dict(tree)


def test_derived_values_and_their_notes():
    asked = made(model={"vocab_size": None, "num_experts": 4}, train={"global_batch": 10}, parallel={"dp": 4})
    resolved, notes = resolve(asked, vocab_size=257)
    assert resolved.model.model_dump() == asked.model.model_dump() | {
        "vocab_size": 320,  # 257 rounded up to a multiple of 64
        "num_kv_heads": 4,
        "head_dim": 12,
        "intermediate_size": 128,  # 8/3 * 48 = 128
        "expert_size": 128,
        "max_positions": 256,
    }
    assert resolved.train.micro_batch == 3  # ceil(10 / 4)
    assert resolved.parallel == asked.parallel
    assert notes == [
        "model.vocab_size=320: the tokenizer's 257, rounded up to a multiple of 64",
        "model.num_kv_heads=4: model.num_heads",
        "model.head_dim=12: hidden_size/num_heads",
        "model.intermediate_size=128: 8/3 hidden_size",
        "model.expert_size=128: model.intermediate_size",
        "model.max_positions=256: train.seq_len",
        "train.micro_batch=3: global_batch / dp",
    ]


@pytest.mark.parametrize(("hidden", "width"), [(192, 512), (256, 704), (4096, 10944)])
def test_width_is_eight_thirds_rounded_up_to_64(hidden, width):
    assert resolve(made(model={"hidden_size": hidden}))[0].model.intermediate_size == width


def test_given_values_are_left_alone():
    asked = made(
        model={"vocab_size": 999, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 10, "expert_size": 6,
               "max_positions": 512},
        train={"micro_batch": 3},
    )  # fmt: skip
    assert resolve(asked, vocab_size=999) == (asked, [])


def test_a_sequence_length_that_has_no_effect_is_noted():
    note = "train.seq_len=32: has no effect, since task=classification learns from images"
    assert note in resolve(load("digits-mlp", ["train.seq_len=32"]))[1]
    note = "train.seq_len=32: has no effect, since task=image_text_contrastive learns from captions"
    assert note in resolve(load("glyphs", ["train.seq_len=32"]))[1]
    for preset in ("digits-mlp", "seq2seq"):
        assert not any("no effect" in each for each in resolve(load(preset), vocab_size=300)[1])
    assert not any("no effect" in each for each in resolve(load("mlm", ["train.seq_len=64"]), vocab_size=257)[1])


def test_automatic_checkpoints_stay_so_until_the_run_knows_more():
    resolved, notes = resolve(made(checkpoint={"every": "auto"}))
    assert resolved.checkpoint.every == "auto"
    assert notes[-1].startswith("checkpoint.every=auto: chosen during the run")
    assert not any("checkpoint" in note for note in resolve(made())[1])


def test_fp16_needs_zero_for_its_fp32_gradients():
    resolved, notes = resolve(made(train={"precision": "fp16"}))
    assert resolved.parallel.zero_stage == 1
    assert notes[-1] == "parallel.zero_stage=1: fp16 accumulates gradients in fp32 from stage 1 on"
    assert resolve(made(train={"precision": "fp16"}, parallel={"zero_stage": 3}))[0].parallel.zero_stage == 3
    assert resolve(made(train={"precision": "bf16"}))[0].parallel.zero_stage == 0
    assert resolve(made())[0].parallel.zero_stage == 0


WHOLE = (
    r"needs whole matrices, which ZeRO 1 to 3 flatten and partition.*set parallel\.zero_stage=0 and "
    r"train\.precision=bf16 or fp32, or optim\.name=adamw"
)
REFUSED = {
    "no vocabulary": (made(model={"vocab_size": None}), r"model\.vocab_size is not set.*: set model\.vocab_size"),
    "sequence too long": (
        made(model={"max_positions": 128}),
        r"train\.seq_len \(256\) is longer than model\.max_positions \(128\): set train\.seq_len=128, or",
    ),
    "idle ranks": (
        made(train={"global_batch": 2}, parallel={"dp": 4}),
        r"train\.global_batch \(2\) is too small for 4 data-parallel ranks: raise it to 4 or lower parallel\.dp",
    ),
    "muon and zero": (made(optim={"name": "muon"}, parallel={"zero_stage": 1}), rf"optim\.name=muon {WHOLE}"),
    "adafactor and fp16": (
        made(optim={"name": "adafactor"}, train={"precision": "fp16"}),
        rf"optim\.name=adafactor {WHOLE}",
    ),
    "sam and fp16": (
        made(optim={"sam": 0.05}, train={"precision": "fp16"}),
        r"optim\.sam needs gradients that are not scaled, but train\.precision=fp16 scales them: set it to bf16 or",
    ),
    "exponential to 0": (
        made(optim={"schedule": "exponential", "min_lr_ratio": 0.0}),
        r"optim\.schedule=exponential never reaches 0: set optim\.min_lr_ratio above 0",
    ),
    "long warmup": (
        made(optim={"warmup": 1001}),
        r"optim\.warmup \(1001\) is longer than train\.steps \(1000\): set optim\.warmup=100, or train\.steps=10010",
    ),
    "long decay": (
        made(optim={"warmup": 300, "schedule": "wsd", "decay_steps": 701}),
        r"optim\.warmup \(300\) and optim\.decay_steps \(701\) add up to more than train\.steps \(1000\): "
        r"set optim\.decay_steps=140, or train\.steps=1001",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(config)
    assert "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_embedding():
    with pytest.raises(
        ConfigError,
        match=r"is 320 but the tokenizer of data\.path has 321 tokens: set model\.vocab_size=384",
    ):
        resolve(made(), vocab_size=321)
    assert resolve(made(), vocab_size=320)[0].model.vocab_size == 320


def test_edge_of_what_is_allowed():
    resolve(made(train={"global_batch": 4}, parallel={"dp": 4}))
    resolve(made(optim={"warmup": 1000}))
    resolve(made(optim={"warmup": 300, "schedule": "wsd", "decay_steps": 700}))
    resolve(made(optim={"decay_steps": 2000}))  # of no use to a cosine
    short = ["optim.schedule=wsd", "optim.decay_steps=390"]  # over a preset's warmup, which follows train.steps
    with pytest.raises(ConfigError, match=r"or train\.steps=400 with optim\.warmup=10"):
        resolve(load("quickstart", [*short, "train.steps=100"]), vocab_size=64)
    resolve(load("quickstart", [*short, "train.steps=400", "optim.warmup=10"]), vocab_size=64)
    resolve(made(model={"max_positions": 256}))


@pytest.mark.parametrize(
    ("preset", "override", "followed"),
    [
        ("quickstart", "train.steps=10", {"optim.warmup": 1}),
        ("quickstart", "train.steps=1e1", {"optim.warmup": 1}),
        ("quickstart", "train.steps='10'", {"optim.warmup": 1}),
        ("quickstart", "train.steps=1", {"optim.warmup": 0}),
        ("quickstart", "train.steps=399", {"optim.warmup": 39}),
        ("quickstart", "train.steps=400", {}),
        ("quickstart", "train.steps=1000", {}),
        ("dense-7b", "train.steps=100", {"optim.warmup": 10}),
        ("dense-small", "train.steps=100", {"optim.warmup": 10}),
        ("quickstart", "model.hidden_size=256", {"model.num_heads": 8}),  # heads of 32, as in the preset
        ("moe-1b-a300m", "model.hidden_size=100", {"model.num_heads": 2, "model.num_kv_heads": 2}),
        ("quickstart", "model.num_heads=3", {"model.num_kv_heads": 1}),
        ("quickstart", "model.num_heads=8", {}),
        ("moe-1b-a300m", "model.num_experts=4", {"model.top_k": 4}),
        ("moe-1b-a300m", "train.global_batch=16", {"train.micro_batch": 2}),
        ("moe-1b-a300m", "cluster.workers=[2,4]", {"parallel.dp": 4}),
    ],
)
def test_what_a_preset_chose_follows_the_key_that_is_changed(preset, override, followed):
    key = override.partition("=")[0]
    before, _ = resolve(load(preset), vocab_size=4096)
    after, notes = resolve(load(preset, [override]), vocab_size=4096)
    old, new = flatten(before), flatten(after)
    changed = {each: new[each] for each in old if old[each] != new[each] and each != key}
    given = {each: value for each, value in changed.items() if flatten(load(preset))[each] is not None}
    assert given == followed
    told = {note.partition(":")[0] for note in notes}
    assert {f"{each}={value}" for each, value in followed.items()} <= told
    assert resolve(after) == (after, []), "nothing follows twice"


def test_a_users_own_value_never_follows(tmp_path):
    """Not the one that is given beside the change, nor one of the user's file."""
    with pytest.raises(ConfigError, match=r"set optim\.warmup=1, or train\.steps=500"):
        resolve(load("quickstart", ["train.steps=10", "optim.warmup=50"]), vocab_size=4096)
    (tmp_path / "mine.yaml").write_text("base: quickstart\ntrain: {steps: 500}\noptim: {warmup: 60}\n")
    with pytest.raises(ConfigError, match=r"optim\.warmup \(60\) is longer than train\.steps \(10\)"):
        resolve(load(tmp_path / "mine.yaml", ["train.steps=10"]), vocab_size=4096)
    (tmp_path / "ours.yaml").write_text("base: quickstart\ntrain: {steps: 20}\n")
    assert resolve(load(tmp_path / "ours.yaml"), vocab_size=4096)[0].optim.warmup == 2
    with pytest.raises(ConfigError, match=r"model\.top_k is 2 but model\.num_experts is 1: set model\.top_k=1"):
        load("quickstart", ["model.num_experts=1", "model.top_k=2"])


def test_a_presets_vocabulary_grows_with_the_tokenizer():
    resolved, notes = resolve(load("moe-8x7b"), vocab_size=50_000)
    assert resolved.model.vocab_size == 50_048
    assert notes[0] == "model.vocab_size=50048: the preset's 32000 is smaller than the tokenizer's 50000"
    with pytest.raises(ConfigError, match=r"set model\.vocab_size=50048"):
        resolve(load("moe-8x7b", ["model.vocab_size=32000"]), vocab_size=50_000)


ALLOWED = {
    "parallel.dp=2": ["parallel.dp", "train.micro_batch"],  # micro_batch is derived from dp
    "parallel.zero_stage=3": ["parallel.zero_stage"],
    "train.micro_batch=4": ["train.micro_batch"],
    "train.steps=1234": ["train.steps"],
    "cluster.cpus_per_worker=2": ["cluster.cpus_per_worker"],
    "cluster.address=auto": ["cluster.address"],
    "tracking.uri=http://localhost:5000": ["tracking.uri"],
    "tracking.experiment=other": ["tracking.experiment"],
    "checkpoint.every=10": ["checkpoint.every"],
    "checkpoint.keep=5": ["checkpoint.keep"],
    "run.root=elsewhere": ["run.root"],
}
REFUSED_CHANGES = {
    "model.hidden_size=384": ["model.head_dim", "model.hidden_size", "model.intermediate_size"],
    "model.top_k=1": ["model.top_k"],
    "model.rope_scaling.factor=2": [
        f"model.rope_scaling.{key}"
        for key in ("beta_fast", "beta_slow", "factor", "high_freq_factor", "kind", "low_freq_factor")
    ],
    "data.path=other": ["data.path"],
    "data.document_mask=false": ["data.document_mask"],
    "optim.name=lion": ["optim.name"],
    "optim.lr=1e-4": ["optim.lr"],
    "optim.betas=[0.9, 0.99]": ["optim.betas"],
    "optim.schedule=wsd": ["optim.schedule"],
    "optim.warmup=31": ["optim.warmup"],
    "train.global_batch=32": ["train.global_batch"],
    "train.seq_len=128": ["model.max_positions", "train.seq_len"],
    "train.grad_clip=0": ["train.grad_clip"],
    "run.seed=1": ["run.seed"],
}  # fmt: skip


def compare(override):
    before, after = (resolve(load("quickstart", asked), vocab_size=4096)[0] for asked in ([], [override]))
    return differences(before, after)


@pytest.mark.parametrize(("override", "keys"), ALLOWED.items(), ids=ALLOWED.keys())
def test_a_run_may_change(override, keys):
    allowed, refused = compare(override)
    assert sorted(allowed) == keys
    assert not refused


@pytest.mark.parametrize(("override", "keys"), REFUSED_CHANGES.items(), ids=REFUSED_CHANGES.keys())
def test_a_run_may_not_change(override, keys):
    allowed, refused = compare(override)
    assert sorted(refused) == keys
    assert set(allowed) <= {"train.micro_batch"}  # derived from the batch


def test_a_change_shows_both_values():
    assert compare("parallel.dp=2") == ({"parallel.dp": (1, 2), "train.micro_batch": (8, 4)}, {})
    assert differences(load("quickstart"), load("quickstart")) == ({}, {})
    assert compare("optim.betas=[0.8, 0.95]")[1] == {"optim.betas": ([0.9, 0.95], [0.8, 0.95])}


def test_an_elastic_run_has_any_number_of_processes_that_its_degrees_go_with():
    model = {"num_experts": 4}
    elastic, notes = resolve(made(model=model, parallel={"ep": 2}, cluster={"workers": [2, 6]}))
    assert elastic.parallel.dp == 6
    assert "parallel.dp=6: the maximum of cluster.workers / (tp * pp * sp)" in notes
    assert worker_counts(elastic) == [6, 4, 2]  # ep=2 divides them
    assert worker_counts(resolve(made(parallel={"dp": 3}))[0]) == [3]
    fewer = with_workers(elastic, 4)
    assert differences(elastic, fewer) == ({"parallel.dp": (6, 4)}, {})
    assert resolve(elastic)[0] == elastic
    for wrong in (3, 1, 8):
        with pytest.raises(ConfigError):
            with_workers(elastic, wrong)
    with pytest.raises(ConfigError, match=r"cluster\.workers=\[min, max\]"):
        with_workers(resolve(made())[0], 2)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"cluster": {"workers": [4, 2]}}, "minimum first, then maximum: .2, 4."),
        ({"cluster": {"workers": [1, 4]}, "parallel": {"dp": 2}}, "leave parallel.dp out"),
        ({"cluster": {"workers": [1, 3]}, "parallel": {"tp": 2}}, "choose tp . pp . sp so that it divides 3"),
    ],
)
def test_elastic_mistakes(sections, words):
    with pytest.raises(ConfigError, match=words):
        resolve(made(**sections))


def test_a_plugin_may_lie_in_another_copy_of_the_working_directory(tmp_path, monkeypatch):
    """Each job of a cluster has one of its own."""
    monkeypatch.chdir(tmp_path)

    def with_plugin(*paths: str, start: str | None = None) -> Config:
        return from_dict({"plugins": list(paths), "train": {"init_from": start}})

    here = with_plugin(f"{tmp_path}/tools/mine.py", start=f"{tmp_path}/base")
    before = with_plugin("/old/work/tools/mine.py", start="/old/work/base")
    assert differences(before, here) == (
        {
            "plugins": (["/old/work/tools/mine.py"], [f"{tmp_path}/tools/mine.py"]),
            "train.init_from": ("/old/work/base", f"{tmp_path}/base"),
        },
        {},
    )
    for other in (
        with_plugin("/old/work/tools/other.py", start="/old/work/base"), with_plugin(start="/old/work/base"),
        with_plugin("/old/mine.py", start="/old/base"), with_plugin("/old/tools/mine.py", "x", start="/old/base"),
    ):  # fmt: skip
        assert differences(other, here)[1].keys() == {"plugins"}
    assert differences(here, before)[1].keys() == {"plugins", "train.init_from"}  # which is not below this one


def test_the_table_of_optimizers_has_each_that_a_config_may_name():
    assert set(OPTIMIZERS) == set(get_args(OptimConfig.model_fields["name"].annotation))

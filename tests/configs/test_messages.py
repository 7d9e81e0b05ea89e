"""What a user reads after a mistake in the config: the key, what was given, what would be right, in one line."""

import pytest

from configs import ConfigError, from_dict, load

WRONG = {
    # unknown keys
    "optim.nme=x": "unknown key optim.nme: did you mean optim.name?",
    "optm.lr=1": "unknown key optm: did you mean optim?",
    "lr=1e-3": "unknown key lr: did you mean optim.lr?",
    "gpus=2": "unknown key gpus: did you mean parallel.dp?",
    "batch_size=8": "unknown key batch_size: did you mean train.global_batch?",
    "learning_rate=1": "unknown key learning_rate: did you mean optim.lr?",
    "epochs=2": "unknown key epochs: did you mean train.steps?",
    "name=mine": "unknown key name: did you mean run.name?",
    "optimizer=lion": "unknown key optimizer: did you mean optim.name?",
    "train.lr=1e-3": "unknown key train.lr: did you mean optim.lr?",
    "train.spike.windw=9": "unknown key train.spike.windw: did you mean train.spike.window?",
    "data.prepare.tokeniser=x": "unknown key data.prepare.tokeniser: did you mean data.prepare.tokenizer?",
    "model.rope_scaling={kin: yarn, factor: 2}": (
        "unknown key model.rope_scaling.kin: did you mean model.rope_scaling.kind?"
    ),
    "data.path=[{pth: a}]": "unknown key data.path.0.pth: did you mean data.path.0.path?",
    "data.path=[{path: a}, {path: b, wieght: 2}]": "unknown key data.path.1.wieght: did you mean data.path.1.weight?",
    "xyz=1": "unknown key xyz: known keys: run, model, train, optim, data, parallel, checkpoint, tracking, cluster, "
    "task, plugins",
    "parallel.xyz=1": "unknown key parallel.xyz: known keys: dp, tp, pp, pp_schedule, ep, sp, zero_stage, hpz, offload",
    # numbers
    "train.steps=0": "train.steps=0: should be greater than 0",
    "train.steps=1.5": "train.steps=1.5: should be a whole number",
    "train.steps=many": 'train.steps="many": should be a whole number',
    "train.steps=yes": "train.steps=true: true and false (in YAML also yes, no, on, off) are not valid here: "
    "Optimizer steps of the whole run.",
    "train.grad_clip=off": "train.grad_clip=false: true and false (in YAML also yes, no, on, off) are not valid here: "
    "Maximum global gradient norm; 0: no clipping.",
    "train.steps=": "train.steps=null: should be a whole number",
    "train.steps.x=3": 'train.steps={"x": 3}: should be a whole number',
    "optim.lr=-1": "optim.lr=-1: should be greater than 0",
    "optim.lr=fast": 'optim.lr="fast": should be a number',
    "optim.lr=1e-3x": 'optim.lr="1e-3x": should be a number',
    "optim.lr=.nan": "optim.lr=NaN: should be a finite number",
    "optim.lr=.inf": "optim.lr=Infinity: should be a finite number",
    "model.dropout=1": "model.dropout=1: should be less than 1",
    "model.num_experts=true": "model.num_experts=true: "
    "true and false (in YAML also yes, no, on, off) are not valid here: Experts per MoE layer; 0: dense.",
    "checkpoint.every=-1": "checkpoint.every=-1: should be greater than or equal to 0",
    "checkpoint.every=Auto": 'checkpoint.every="Auto": should be a whole number or auto',
    "checkpoint.every=1.5": "checkpoint.every=1.5: should be a whole number or auto",
    "cluster.gpus_per_worker=-1": "cluster.gpus_per_worker=-1: should be greater than or equal to 0",
    # one of several
    "optim.name=adamww": 'optim.name="adamww": should be one of adamw, adam, sgd, adagrad, rmsprop, adafactor, lion, '
    "muon; did you mean adamw?",
    "optim.name=Lion": 'optim.name="Lion": should be one of adamw, adam, sgd, adagrad, rmsprop, adafactor, lion, '
    "muon; did you mean lion?",
    "train.precision=16": 'train.precision="16": should be one of fp32, bf16, fp16, fp8; did you mean fp16?',
    "train.activation_checkpointing=some": 'train.activation_checkpointing="some": should be one of none, full, '
    "selective",
    "train.precision=int8": 'train.precision="int8": should be one of fp32, bf16, fp16, fp8',
    "parallel.zero_stage=4": "parallel.zero_stage=4: should be one of 0, 1, 2, 3",
    # lists and sections
    "optim.betas=0.9": "optim.betas=0.9: should be a list, such as [a, b]",
    "optim.betas=[0.9]": "optim.betas=[0.9]: value 2 is missing",
    "optim.betas=[0.9, 0.9, 1]": "optim.betas=[0.9, 0.9, 1]: should have 2 values",
    "optim.betas=[2, 0.9]": "optim.betas.0=2: should be less than 1",
    "train.sample_prompts=abc": 'train.sample_prompts="abc": should be a list, such as [a, b]',
    "train.sample_prompts=[1]": "train.sample_prompts.0=1: should be text (in quotes if it looks like a number)",
    "plugins=a.py": 'plugins="a.py": should be a list, such as [a, b]',
    "checkpoint=off": "checkpoint=false: should be a section of keys: every, keep, keep_every, background; "
    "for no checkpoints during training, set checkpoint.every=0",
    "model=llama": 'model="llama": should be a section of keys: family, vocab_size, num_layers, hidden_size, ...; '
    "set model.family to name an architecture, or model.from to name a Hugging Face folder",
    "train=3": "train=3: should be a section of keys: steps, global_batch, micro_batch, seq_len, ...",
    "model.rope_scaling=yarn": 'model.rope_scaling="yarn": should be a section of keys: kind, factor, '
    "original_max_positions, low_freq_factor, ...",
    "model.rope_scaling.kind=yarn": 'model.rope_scaling={"kind": "yarn"}: kind yarn needs factor ('
    "how many times longer the context becomes) and original_max_positions (the context length that the model "
    "was trained for without scaling)",
    "model.rope_scaling.low_freq_factor=2": 'model.rope_scaling.factor is missing in {"low_freq_factor": 2}',
    "model.rope_scaling={kind: linear, factor: null}": "model.rope_scaling.factor=null: should be a number",
    "train.compile=7": "train.compile=7: should be true or false",
    # text or a list
    "data.path=null": "data.path=null: should be text or a list",
    "data.path={path: a}": 'data.path={"path": "a"}: should be text or a list',
    "data.path=[a]": 'data.path.0="a": write {path: a, weight: 1}',
    "data.path=[{weight: 1}]": 'data.path.0.path is missing in {"weight": 1}',
    "data.path=[{path: a, weight: 0}]": "data.path.0.weight=0: should be greater than 0",
    # what a section checks as a whole
    "run.name=a b": "run.name=\"a b\": letters, digits, '.', '_' and '-' only, as it names a folder",
    "run.name=../x": "run.name=\"../x\": letters, digits, '.', '_' and '-' only, as it names a folder",
    "train.micro_batch=100": "train.micro_batch (100) is larger than train.global_batch (8): set train.micro_batch=8",
    "model.top_k=9": "model.top_k is 9 but model.num_experts is 8: set model.top_k=8 or lower",
    "model.num_kv_heads=5": "model.num_heads (6) is not a multiple of model.num_kv_heads (5): set model.num_kv_heads=1",
    "model.num_heads=5": "model.hidden_size (192) is not a multiple of model.num_heads (5): set model.head_dim=38",
    "model.block_sparse.local_blocks=0": "model.block_sparse.local_blocks=0: should be greater than 0",
    "model.block_sparse.blocks=8": "unknown key model.block_sparse.blocks: did you mean model.block_sparse.block?",
    "model={sliding_window: 4, block_sparse: {}}": "model.sliding_window (4) "
    "and model.block_sparse exclude each other: set one of them to null",
    "model.head_dim=7": "model.head_dim is 7: rotary positions need an even number",
    "model.moe_every=9": "model.num_experts is 8 but no layer is MoE: model.moe_every (9) and "
    "model.first_dense_layers (0) leave none of the 4 layers for experts",
}

NO_OVERRIDE = {
    "nokey": "'nokey' is not key=value, such as train.steps=100",
    "=3": "'=3' is not key=value, such as train.steps=100",
    "optim..lr=3": "'optim..lr=3' is not key=value, such as train.steps=100",
    "train.steps=[": "train.steps=[: the value is not YAML: expected the node content, but found '<stream end>' "
    "(line 1, column 2)",
    "optim={3: x}": "optim={3: x}: the value is not YAML: the key 3 is read as int: quote it (line 1, column 2)",
    "optim={lr: 1, lr: 2}": "optim={lr: 1, lr: 2}: the value is not YAML: duplicate key lr (line 1, column 9)",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG.keys())
def test_wrong_value(override, message):
    with pytest.raises(ConfigError) as caught:
        load("quickstart", [override])
    assert str(caught.value) == f"quickstart: {message}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "a traceback would show pydantic's own report too"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.stages=[{width: 8, blok: conv}]", "model.stages.0.blok: did you mean model.stages.0.block?"),
        ("model.stages=[{width: 8, xyz: 1}]", "model.stages.0.xyz: known keys: block, width, depth, "),
    ],
)
def test_a_wrong_key_of_a_stage(override, message):
    with pytest.raises(ConfigError) as caught:
        load("digits-convnet", [override])
    assert str(caught.value).startswith(f"digits-convnet: unknown key {message}")


@pytest.mark.parametrize(("override", "message"), NO_OVERRIDE.items(), ids=NO_OVERRIDE.keys())
def test_not_an_override(override, message):
    with pytest.raises(ConfigError) as caught:
        load("quickstart", [override])
    assert str(caught.value) == message


def test_several_mistakes_are_at_most_three_lines():
    with pytest.raises(ConfigError) as caught:
        load("quickstart", ["train.steps=0", "optim.lr=-1", "optim.nme=x", "parallel.dp=0"])
    assert str(caught.value).splitlines() == [
        "quickstart: train.steps=0: should be greater than 0",
        "quickstart: optim.lr=-1: should be greater than 0",
        "quickstart: unknown key optim.nme: did you mean optim.name?",
    ]


def test_a_long_value_is_cut():
    with pytest.raises(ConfigError) as caught:
        load("quickstart", ["train.sample_prompts=" + "x" * 1000])
    assert len(str(caught.value)) < 250


def test_from_dict_names_its_source():
    with pytest.raises(ConfigError, match=r"^sweep: optim\.lr=-1: should be greater than 0$"):
        from_dict({"optim": {"lr": -1}}, where="sweep")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.steps: 5", "unknown key train.steps: in a file it is train: {steps: 5}"),
        ("train:\n  profile.steps: 5", "unknown key train.profile.steps: in a file it is profile: {steps: 5}"),
        ("model.from: folder", 'unknown key model.from: in a file it is model: {from: "folder"}'),
        ("optim.muon.lr: 5", "unknown key optim.muon.lr: in a file it is optim: {muon: {lr: 5}}"),
    ],
)
def test_a_key_with_dots_in_a_file_is_told_how_it_is_written(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(tmp_path / "c.yaml")
    assert words in str(refused.value)

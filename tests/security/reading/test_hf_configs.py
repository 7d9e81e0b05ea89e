"""Whatever a Hugging Face folder holds, opening it ends in a model or in one message, before any tensor is read."""

import json
import os
import struct
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from no_hang import ends
from safetensors.torch import load_file, save_file

from configs import ConfigError
from models.decoder.generate import generate
from models.hf.config_json import from_hf_config
from models.hf.folder import export_hf, import_hf
from models.hf.weight_files import MAX_HEADER, MAX_INDEX, MAX_TENSORS

LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8}
MOE = QWEN3 | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
GLM = MOE | {
    "model_type": "glm4_moe", "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

WRONG = [
    (LLAMA, {"model_type": None}, "model_type null is not supported: should be one of llama"),
    (LLAMA, {"model_type": ["llama"]}, 'model_type ["llama"] is not supported: should be one of llama'),
    (LLAMA, {"model_type": {"a": 1}}, 'model_type {"a": 1} is not supported: should be one of llama'),
    (LLAMA, {"model_type": "x" * 10_000}, "is not supported: should be one of llama"),
    (LLAMA, {"vocab_size": "32"}, 'vocab_size="32": should be a whole number'),
    (LLAMA, {"vocab_size": 32.5}, "vocab_size=32.5: should be a whole number"),
    (LLAMA, {"vocab_size": True}, "vocab_size=true: should be a whole number"),
    (LLAMA, {"vocab_size": [32]}, "vocab_size=[32]: should be a whole number"),
    (LLAMA, {"vocab_size": None}, "vocab_size=null: should be a whole number"),
    (LLAMA, {"vocab_size": 10**4000}, "vocab_size=1000"),
    (LLAMA, {"hidden_size": 10**12}, "hidden_size=1000000000000: should be less than or equal to"),
    (LLAMA, {"hidden_size": -16}, "hidden_size=-16: should be greater than 0"),
    (LLAMA, {"num_attention_heads": 0}, "num_attention_heads=0: should be greater than 0"),
    (LLAMA, {"num_key_value_heads": 0}, "num_key_value_heads=0: should be greater than 0"),
    (LLAMA, {"num_key_value_heads": 3}, "model.num_heads (2) is not a multiple of model.num_kv_heads (3)"),
    (LLAMA, {"num_attention_heads": 2**24, "head_dim": 2**24}, "model.num_heads * model.head_dim is"),
    (LLAMA, {"num_hidden_layers": 100_000}, "num_hidden_layers=100000: should be less than or equal to 10000"),
    (LLAMA, {"num_hidden_layers": []}, "num_hidden_layers=[]: should be a whole number"),
    (LLAMA, {"max_position_embeddings": 1e30}, "max_position_embeddings=1e+30: should be a whole number"),
    (LLAMA, {"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6": should be a number'),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps=0: should be greater than 0"),
    (LLAMA, {"tie_word_embeddings": "false"}, 'tie_word_embeddings="false": should be true or false'),
    (LLAMA, {"attention_bias": [True]}, "attention_bias=[true] is not supported, only false"),
    (LLAMA, {"transformers_weights": "a.safetensors"}, 'transformers_weights="a.safetensors" is not supported'),
    (LLAMA, {"hidden_act": None}, 'hidden_act=null is not supported, only "silu"'),
    (LLAMA, {"rope_theta": []}, "rope_theta=[]: should be a number"),
    (LLAMA, {"rope_theta": -1.0}, "rope_theta=-1.0: should be greater than or equal to 1"),
    (LLAMA, {"rope_theta": 1e300}, "rope_theta=1e+300: should be less than or equal to 1000"),
    (LLAMA, {"rope_scaling": []}, "rope_scaling=[]: should be a section of keys"),
    (LLAMA, {"rope_scaling": "yarn"}, 'rope_scaling="yarn": should be a section of keys'),
    (LLAMA, {"rope_scaling": {"rope_type": []}}, "rope_scaling.rope_type=[]: should be text"),
    (LLAMA, {"rope_scaling": {"rope_type": "x" * 1000}}, "is not supported: should be default, linear, llama3, yarn"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor, a number of at least 1"),
    (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": None}},
        "rope_type 'linear' needs factor, a number of at least 1",
    ),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' needs factor, a number of at least 1"),
    (LLAMA, {"rope_scaling": {"factor": 8.0}}, "lacks rope_type: default, linear, llama3 or yarn"),
    (LLAMA, {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "differ: keep one"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for full_attention are not supported"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": "x"}}, 'rope_scaling.factor="x": should be a number'),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": [2]}}, "rope_scaling.factor=[2]: should be a number"),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        "rope_scaling.factor=0: should be greater than or equal to 1",
    ),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "rope_parameters.factor=-2.0: should be"),
    (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, "should be less than or equal to 1000"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
    (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor (1) should be above low_freq_f"),
    (LLAMA, {"rope_scaling": YARN, "rope_theta": 1.0}, "rope_scaling.kind=yarn needs a value above 1"),
    (LLAMA, {"rope_scaling": YARN | {"mscale": {"a": [1]}}}, "has keys that model.rope_scaling does not support"),
    (LLAMA, {"rope_scaling": YARN | {"original_max_position_embeddings": 0.5}}, "should be a whole number"),
    (QWEN3, {"use_sliding_window": True, "sliding_window": "4"}, 'sliding_window="4": should be a whole number'),
    (QWEN3, {"use_sliding_window": 1, "sliding_window": 4}, "use_sliding_window=1: should be true or false"),
    (QWEN3, {"layer_types": ["full_attention"] * 100_000}, "should have at most 10000 values"),
    (QWEN3, {"layer_types": "full_attention"}, 'layer_types="full_attention": should be a list'),
    (QWEN3, {"layer_types": [["full_attention"]]}, "layer_types.0="),
    (QWEN3, {"max_window_layers": None}, "max_window_layers=null: should be a whole number"),
    (MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step=0: should be greater than 0"),
    (MOE, {"mlp_only_layers": [0]}, "no layer is MoE"),
    (MOE, {"mlp_only_layers": {"0": 1}}, 'mlp_only_layers={"0": 1}: should be a list'),
    (MOE, {"mlp_only_layers": ["0"]}, 'mlp_only_layers.0="0": should be a whole number'),
    (MOE, {"num_experts": 10**9}, "num_experts=1000000000: should be less than or equal to"),
    (MOE, {"num_experts": None}, "num_experts is missing"),
    (MOE, {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    (MOE, {"num_experts_per_tok": 5}, "model.top_k is 5 but model.num_experts is 4"),
    (MOE, {"moe_intermediate_size": "8"}, 'moe_intermediate_size="8": should be a whole number'),
    (MOE, {"num_experts": 2**20, "moe_intermediate_size": 2**24, "hidden_size": 2**20}, "model.num_experts * model.e"),
    (MOE | {"model_type": "mixtral"}, {"num_local_experts": -1}, "num_local_experts=-1: should be greater than"),
    (MOE | {"model_type": "qwen2_moe", "qkv_bias": False}, {"shared_expert_intermediate_size": "a"}, "shared_expert_i"),
    (GLM, {"n_shared_experts": "xxxxxxxxxx"}, 'n_shared_experts="xxxxxxxxxx": should be a whole number'),
    (GLM, {"n_shared_experts": 2**20, "moe_intermediate_size": 2**20}, "shared_expert_size=1099511627776: should be"),
    (GLM, {"n_group": 0}, "n_group=0: should be greater than 0"),
    (GLM, {"n_group": 3}, "model.expert_groups=3"),
    (GLM, {"routed_scaling_factor": None}, "routed_scaling_factor=null: should be a number"),
    (GLM, {"first_k_dense_replace": 7}, "no layer is MoE"),
]


@pytest.mark.parametrize("kind", [LLAMA, QWEN3, MOE, GLM], ids=lambda tree: tree["model_type"])
def test_what_the_wrong_ones_are_made_of_is_read(kind):
    model, _ = from_hf_config(kind)
    assert (model.vocab_size, model.num_layers, model.head_dim) == (32, 1, 8)


@pytest.mark.parametrize(("kind", "changes", "told"), WRONG, ids=lambda x: None if isinstance(x, str) else str(x)[:50])
def test_a_wrong_value_is_named_with_its_key(kind, changes, told):
    with ends(), pytest.raises(ConfigError) as caught:
        from_hf_config(kind | changes, "folder/config.json")
    assert told in str(caught.value)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    assert all(line.startswith("folder/config.json") and len(line) < 500 for line in lines)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[]", "holds [], not the keys of a model"),
        (b"null", "holds null, not the keys of a model"),
        (b"", "cannot be read as JSON: Expecting value"),
        (b"[" * 100_000, "cannot be read as JSON: it is nested too deep"),
        (b'{"a":' * 100_000, "cannot be read as JSON: it is nested too deep"),
        (b'{"model_type": "llama", "model_type": "qwen3"}', "duplicate key 'model_type'"),
        (b'{"model_type": NaN}', "NaN is not a JSON number"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "an integer has thousands of digits"),
        (b'{"model_type": "\xff"}', "it is not UTF-8 text"),
        (json.dumps(LLAMA).encode("utf-16"), "it is not UTF-8 text"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "it has over 4,194,304 bytes"),
    ],
    ids=range(11),
)
def test_a_file_that_is_no_config(tmp_path, text, told):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        import_hf(tmp_path)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model as a Hugging Face folder."""
    config = tiny.config()
    export_hf(tiny.model(config), config, tmp_path)
    import_hf(tmp_path)
    return tmp_path


def refusal(folder: Path) -> str:
    with ends(), pytest.raises(ConfigError) as caught:
        import_hf(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700
    return str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_more_layers_or_experts_than_tensors_are_refused_before_they_are_built(folder):
    edit(folder, num_hidden_layers=10_000)
    assert "too few for the num_hidden_layers=10000" in refusal(folder)
    edit(folder, num_hidden_layers=2, num_experts=2**20, num_local_experts=2**20)
    assert "too few for the experts" in refusal(folder)


def header(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def write(path: Path, tree: object) -> None:
    """Put another header in front of a file's tensors."""
    content = path.read_bytes()
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + int.from_bytes(content[:8], "little") :])


def test_headers_that_are_wrong(folder):
    path = folder / "model.safetensors"
    good, tree = path.read_bytes(), header(path)
    name = "model.embed_tokens.weight"
    begin, end = tree[name]["data_offsets"]
    rows, columns = tree[name]["shape"]
    half = {"dtype": "I16", "shape": [rows, 2 * columns], "data_offsets": [begin, end]}
    wrong = {
        "is not safetensors: a header of 18,446,744,073,709,551,615 bytes": b"\xff" * 8 + good[8:],
        "is not safetensors: a header of 33,554,433 bytes": struct.pack("<Q", MAX_HEADER + 1) + good[8:],
        "is not safetensors: ": b"",
        "is not safetensors:  ": good[:100],
        "is not safetensors:   ": good[:-4],
        "is not safetensors:    ": good + b"more",
    }
    for told, content in wrong.items():
        path.write_bytes(content)
        assert told.strip() in refusal(folder)
    for told, changed in {
        "is not safetensors": [
            *(tree[name] | {"data_offsets": offsets} for offsets in ([begin, end - 4], [0, 2**63], [end, begin])),
            *(tree[name] | {"shape": shape} for shape in ([2**62, 2**62], [-1, columns])),
            tree[name] | {"dtype": "PICKLE"}, [], None,
        ],
        "has shape [1, ": [tree[name] | {"shape": [1, rows * columns]}],
        "has dtype I16: should be one of F64, F32, F16, BF16": [half],
    }.items():  # fmt: skip
        for entry in changed:
            path.write_bytes(good)
            write(path, tree | {name: entry})
            assert told in refusal(folder), entry
    for text in (b"[]", b"null", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"):
        path.write_bytes(good)
        write(path, text)
        assert "is not safetensors" in refusal(folder)


def test_tensors_of_other_types_and_values(folder):
    path, name = folder / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path)
    assert "has dtype I8: should be one of F64, F32, F16, BF16" in refusal(folder)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path)
    assert "has dtype F8_E4M3: should be one of" in refusal(folder)
    save_file(tensors | {name: tensors[name][:1].clone()}, path)
    assert f"tensor {name} has shape [1, " in refusal(folder)
    for value in (float("nan"), float("inf")):
        broken = tensors[name].clone()
        broken[0, 0] = value
        save_file(tensors | {name: broken}, path)
        _, weights = import_hf(folder)
        with pytest.raises(ConfigError, match=f"tensor {name} has values that are not finite"):
            weights[name]


def test_only_files_of_the_folder_are_read_whatever_its_index_says(folder, tmp_path_factory):
    path, other = folder / "model.safetensors", tmp_path_factory.mktemp("other")
    tensors = header(path).keys() - {"__metadata__"}
    os.rename(path, other / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in (
        str(other / "model.safetensors"), f"../{other.name}/model.safetensors", "./model.safetensors", "..", "", "a\\b",
        "model.bin", None, 1, ["model.safetensors"], {"a": 1},
    ):  # fmt: skip
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        assert "should be the plain name of a *.safetensors file beside it" in refusal(folder)
    for name in ("model.safetensors", "x" * 5000 + ".safetensors", "\0.safetensors", "\x1b[31m.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        assert "but there is no such file beside it" in refusal(folder)
    for text in ("[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "model.safetensors"}'):
        index.write_text(text)
        assert "weight_map should be a section of tensors" in refusal(folder)
    for text in ("", "[" * 100_000, '{"weight_map": {"a": "a", "a": "b"}}', '{"a": "' + "x" * MAX_INDEX + '"}'):
        index.write_text(text)
        assert "model.safetensors.index.json cannot be read as JSON" in refusal(folder)
    index.unlink()
    assert "has no *.safetensors file" in refusal(folder)
    path.mkdir()
    assert "is not a file" in refusal(folder)
    path.rmdir()
    os.mkfifo(path)  # opened, it would wait for a writer for ever
    assert "is not a file" in refusal(folder)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "is not a file" in refusal(folder)
    path.unlink()
    path.symlink_to(other / "model.safetensors")  # as the cache of huggingface_hub has its files
    import_hf(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "is not a Hugging Face model folder" in refusal(folder)


def test_a_number_that_fp32_does_not_hold_is_refused(folder):
    """Also where it is one of the parts that a stack is made of, whatever the type of its first one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    stacked = next(name for name in tensors if ".experts.1." in name)
    for name in ("model.layers.0.self_attn.q_proj.weight", stacked):
        wide = tensors[name].double()
        wide[0, 0] = 1e300
        save_file(tensors | {name: wide}, path)
        _, weights = import_hf(folder)
        with pytest.raises(ConfigError, match=f"tensor {name} has values that are not finite"):
            dict(weights)
        mixed = tensors[name].double() * (1 + 2**-12)  # which fp16 and bf16 would round away
        save_file({other: tensor.bfloat16() for other, tensor in tensors.items()} | {name: mixed}, path)
        _, weights = import_hf(folder)
        found = [row for tensor in dict(weights).values() for row in tensor.reshape(-1, tensor.shape[-1])]
        assert any(torch.equal(row, mixed[0].float()) for row in found if row.shape == mixed[0].shape)


@pytest.mark.slow
def test_headers_are_bounded_together(folder):
    """Each may be within the bound, and their tensors may be empty."""
    empty = {f"e{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS)}
    path = folder / "model.safetensors"
    good, tree = path.read_bytes(), header(path)
    write(path, tree | empty)
    assert f"its safetensors files contain over {MAX_TENSORS:,} tensors" in refusal(folder)
    path.write_bytes(good)
    names = list(tree.keys() - {"__metadata__"})
    content = b"{}" + b" " * (MAX_HEADER // 2)
    for shard in ("a", "b", "c"):
        (folder / f"{shard}.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    path = path.rename(folder / "d.safetensors")
    index = {name: f"{'abc'[i % 3]}.safetensors" for i, name in enumerate(names)}
    index[names[0]] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert f"the headers of its safetensors files have {len(content) * 3 + int.from_bytes(good[:8], 'little'):,}" in (
        refusal(folder)
    )


def test_positions_are_not_compressed_and_logits_that_are_not_finite_are_named(folder):
    for changes, told in (
        ({"rope_theta": 1e-300}, "rope_theta=1e-300: should be greater than or equal to 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, "factor=1e-300: should be greater than or equal"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor=0.5: should be greater than or equal to 1"),
    ):
        tree = json.loads((folder / "config.json").read_text())
        edit(folder, **changes)
        assert told in refusal(folder)
        (folder / "config.json").write_text(json.dumps(tree))
    config = tiny.config()
    module = tiny.model(config)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            module.get_parameter("model.norm.weight")[0] = value
        for temperature in (0.0, 0.8):
            with pytest.raises(ConfigError, match="logits are not finite after 3 tokens"):
                generate(module, [[1, 2, 3]], max_new_tokens=2, temperature=temperature)

"""A Hugging Face folder with more safetensors files than its model is made of is read as transformers reads it."""

import json
import shutil

import pytest
import tiny_models as tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs import ConfigError
from models.hf.folder import export_hf, import_hf

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards and their index, and the model's tensors."""
    config = tiny.config(num_experts=0)
    module = tiny.model(config)
    export_hf(module, config, tmp_path, shard_bytes=sum(4 * p.numel() for p in module.parameters()) * 2 // 3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    return tmp_path, {name: p.detach() for name, p in module.named_parameters()}


def check_same(folder, tensors):
    """Ours and those of transformers are these."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    _, ours = import_hf(folder)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor), name
        assert torch.equal(theirs[name], tensor), name


def test_the_index_is_the_authority(sharded):
    folder, tensors = sharded
    stale = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(stale, folder / "model-00003-of-00003.safetensors", metadata={"format": "pt"})
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    (folder / "zz-not-safetensors.safetensors").write_text("no header")
    check_same(folder, tensors)


def test_files_beside_a_single_file_are_not_read(tmp_path):
    config = tiny.config(num_experts=0)
    module = tiny.model(config)
    export_hf(module, config, tmp_path)
    stale = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for name in ("model-00001-of-00001", "consolidated", "adapter_model"):
        save_file(stale, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    check_same(tmp_path, {name: p.detach() for name, p in module.named_parameters()})


def test_an_index_may_name_the_one_file(tmp_path):
    config = tiny.config(num_experts=0)
    module = tiny.model(config)
    export_hf(module, config, tmp_path)
    names = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    check_same(tmp_path, {name: p.detach() for name, p in module.named_parameters()})


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        import_hf(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_ambiguous_files_are_refused_by_name(sharded):
    folder, tensors = sharded
    save_file(tensors, folder / "model.safetensors")
    assert "the only file that transformers would read, and model.safetensors.index.json, which names" in refusal(
        folder
    )
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(
        json.dumps({"weight_map": index["weight_map"] | {"lm_head.weight": "model.safetensors"}})
    )
    assert refusal(folder).endswith(f"delete {INDEX} if model.safetensors contains the whole model")
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).unlink()
    assert "has 2 *.safetensors files, such as" in refusal(folder)
    with pytest.raises(OSError, match="no file named model"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    where = index["weight_map"]
    first, last = where["model.embed_tokens.weight"], where["lm_head.weight"]
    assert first != last
    for wrong, told in (
        ({"lm_head.weight": first}, f'tensor "lm_head.weight" is in "{first}", but it is not'),
        ({"lm_head.weight": "model-00009.safetensors"}, 'names "model-00009.safetensors", but there is no such file'),
        ({"model.extra.weight": first}, 'tensor "model.extra.weight" is in'),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": where | wrong}))
        assert told in refusal(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in where.items() if k != "lm_head.weight"}}))
    assert '1 missing ["lm_head.weight"]' in refusal(folder)


def test_a_tensor_in_two_shards_has_one_value(sharded):
    folder, tensors = sharded
    first, second = sorted(folder.glob("*.safetensors"))
    name = min(load_file(first))
    save_file(load_file(second) | {name: tensors[name]}, second, metadata={"format": "pt"})
    check_same(folder, tensors)
    other = tensors[name].clone()
    other.view(-1)[-1] += 1
    for wrong in (other, other.flatten()[1:].contiguous()):
        save_file(load_file(second) | {name: wrong}, second, metadata={"format": "pt"})
        assert f'tensor "{name}" is in "{first.name}"' in refusal(folder)


def test_a_tied_head_is_the_embedding(tmp_path):
    config = tiny.config(num_experts=0, tie_embeddings=True)
    module = tiny.model(config)
    export_hf(module, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = tensors | {head: tensors[embedding].clone()}
    without = {name: tensor for name, tensor in both.items() if name != embedding}
    for written in (tensors, both, without):
        save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        _, ours = import_hf(tmp_path)
        assert torch.equal(ours[embedding], tensors[embedding])
        assert torch.equal(theirs.lm_head.weight, tensors[embedding])
        assert torch.equal(theirs.model.embed_tokens.weight, tensors[embedding])
    both[head][-1, -1] += 1e-3
    save_file(both, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert f"tie_word_embeddings=true, but {head} and {embedding} differ" in refusal(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    none = {name: tensor for name, tensor in without.items() if name != head}
    save_file(none, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert f'1 missing ["{embedding}"]' in refusal(tmp_path)


def test_adapters_and_quantized_weights_are_recognised(sharded):
    folder, tensors = sharded
    config = json.loads((folder / "config.json").read_text())
    for path in folder.glob("model*"):
        path.unlink()
    for name in ("adapter_model", "lora"):
        adapter = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(2)}
        save_file(adapter, folder / f"{name}.safetensors")
        assert f"contains only an adapter ({name}.safetensors): merge it into its base model first" in refusal(folder)
        (folder / f"{name}.safetensors").unlink()
    up = "model.layers.0.mlp.up_proj.weight"
    for method, codes in (
        ("fp8", {up: tensors[up].to(torch.float8_e4m3fn), f"{up}_scale_inv": torch.ones(1)}),
        ("gptq", {up.replace("weight", part): torch.ones(2, dtype=torch.int32) for part in ("qweight", "qzeros")}),
        (None, {up: tensors[up].to(torch.float8_e4m3fn), f"{up}_scale": torch.ones(1)}),
    ):
        said = {"quantization_config": {"quant_method": method}} if method else {}
        (folder / "config.json").write_text(json.dumps(config | said))
        rest = {name: tensor for name, tensor in tensors.items() if name != up}
        save_file(rest | codes, folder / "model.safetensors")
        assert f"is quantized ({method or 'it has'}" in refusal(folder)


def test_one_file_of_another_name_is_still_read(sharded):
    folder, tensors = sharded
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "weights.safetensors")
    _, ours = import_hf(folder)
    assert torch.equal(ours["lm_head.weight"], tensors["lm_head.weight"])
    shutil.copyfile(folder / "weights.safetensors", folder / "other.safetensors")
    assert 'such as ["other.safetensors", "weights.safetensors"]' in refusal(folder)

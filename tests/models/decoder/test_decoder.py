"""The decoder: documents alone and together, dropout, checkpointing, first weights, compilation."""

from collections import Counter

import pytest
import tiny_models as tiny
import torch
from torch import nn
from torch.nn import functional as F

from configs import BlockSparse, ConfigError
from configs.sections.train import TrainConfig
from models.batch import Batch
from models.decoder.layers import dropout, dropout_keys
from models.families import FAMILIES, Family, build
from models.moe.balance import RouterTap

SPARSE = BlockSparse(block=2, local_blocks=2, global_blocks=1, stride=3)


@pytest.mark.parametrize("pattern", [{}, {"sliding_window": 6}, {"block_sparse": SPARSE}])
@pytest.mark.parametrize("longest_mask", [0, 512])
def test_documents_in_a_row_equal_documents_alone(monkeypatch, pattern, longest_mask):
    monkeypatch.setattr("models.decoder.attention.LONGEST_MASK", longest_mask)
    module = tiny.model(tiny.config(**pattern))
    documents = torch.stack([torch.arange(24) // 9, torch.zeros(24, dtype=torch.long)])
    batch = tiny.batch(2, 24, documents)
    together = module.logits(batch)
    for row, start, stop in ((0, 0, 9), (0, 9, 18), (0, 18, 24), (1, 0, 24)):
        ids = batch.input_ids[row : row + 1, start:stop]
        alone = module.logits(Batch(ids, ids, torch.arange(stop - start)[None], None, torch.zeros(1).long()))
        torch.testing.assert_close(together[row, start:stop], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_equals_logits(num_experts, tied):
    module = tiny.model(tiny.config(num_experts=num_experts, tie_embeddings=tied, shared_expert_size=24, loss_chunk=10))
    batch = tiny.batch()
    output = module(batch)
    plain = F.cross_entropy(module.logits(batch).flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss_sum, plain)
    assert output.tokens == (batch.labels != -100).sum()
    expected = tiny.gradients(module, plain)
    for name, found in tiny.gradients(module, output.loss_sum).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_norm_gradients_equal_autograd():
    module = tiny.model(tiny.config()).model.norm
    x = torch.randn(2, 5, 32, requires_grad=True)
    plain = module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps))
    dy = torch.randn_like(x)
    torch.testing.assert_close(module(x), plain)
    expected = torch.autograd.grad(plain, (x, module.weight), dy)
    torch.testing.assert_close(torch.autograd.grad(module(x), (x, module.weight), dy), expected, rtol=1e-4, atol=1e-5)


def test_dropout_does_not_depend_on_the_split_of_a_batch():
    module = tiny.model(tiny.config(dropout=0.3)).train()
    batch = tiny.batch(4)
    whole = module.logits(batch)
    for rows in (slice(0, 1), slice(1, 4)):
        part = Batch(
            batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows], None, batch.sequence_ids[rows]
        )
        torch.testing.assert_close(module.logits(part), whole[rows], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, module.eval().logits(batch), atol=1e-2)
    other = tiny.model(tiny.config(dropout=0.3), seed=0).train()
    other.model.dropout_seed = 1
    assert not torch.allclose(whole, other.logits(batch), atol=1e-2)


def test_dropout_keeps_its_share_and_scale():
    keys = dropout_keys(3, torch.arange(8), 64)
    ones = torch.ones(8, 64, 256)
    first, second = dropout(ones, keys, 0, 0.3), dropout(ones, keys, 1, 0.3)
    assert abs(float((first == 0).float().mean()) - 0.3) < 0.005
    torch.testing.assert_close(first[first > 0], torch.full_like(first[first > 0], 1 / 0.7))
    assert abs(float(((first == 0) & (second == 0)).float().mean()) - 0.09) < 0.005
    for dim in ((0, 1), (0, 2), (1, 2)):  # no channel, place or sequence is dropped more than another
        shares = (first == 0).float().mean(dim)
        assert shares.std() < 3 * (0.21 / (first.numel() / shares.numel())) ** 0.5


@pytest.mark.parametrize("num_experts", [0, 4])
def test_checkpointing_changes_nothing(num_experts):
    config = tiny.config(num_experts=num_experts, num_layers=3, dropout=0.1)
    kinds = {"none": [0, 0, 0], "full": [2, 2, 2], "selective": [0, 2, 0]}
    results: dict[str, dict[str, torch.Tensor]] = {}
    for kind, recomputed in kinds.items():
        module = tiny.model(config).train()
        module.set_activation_checkpointing(TrainConfig(activation_checkpointing=kind).recompute_every)
        calls: Counter[nn.Module] = Counter()
        for layer in module.model.layers:
            layer.register_forward_pre_hook(lambda layer, _, calls=calls: calls.update([layer]))
        tap = RouterTap(module, config)
        total = torch.zeros(())
        for seed in (0, 1):  # two forward passes before the backward pass, as in gradient accumulation
            total = total + module(tiny.batch(seed=seed)).loss_sum
            if stats := tap.collect():
                total = total + 10 * stats.aux_loss + stats.z_loss
        total.backward()
        assert tap.collect() is None, "a recomputed router was heard"
        assert [calls[layer] - 2 for layer in module.model.layers] == recomputed, kind
        results[kind] = {"loss": total} | {name: p.grad for name, p in module.named_parameters()}
    for kind in ("full", "selective"):
        for name, expected in results["none"].items():
            assert torch.equal(results[kind][name], expected), (kind, name)


def test_first_weights_depend_on_seed_and_name_only():
    config = tiny.config(shared_expert_size=8, qkv_bias=True)
    one, two, other = tiny.model(config), tiny.model(config), tiny.model(config, seed=1)
    with torch.device("meta"):
        assert all(p.is_meta for p in build(config).parameters())
    for (name, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (one, two, other)), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name
    assert not one.model.layers[0].self_attn.k_proj.bias.any()
    std = one.model.layers[0].mlp.experts.gate_up_proj.std()
    assert abs(float(std.detach()) - 0.2) < 0.02


def test_every_parameter_gets_a_gradient_in_bf16():
    config = tiny.config(shared_expert_size=8, num_layers=3, first_dense_layers=1)
    module = tiny.model(config).to(torch.bfloat16)
    tap = RouterTap(module, config)
    output = module(tiny.batch(documents=torch.arange(24).expand(3, 24) // 10))
    stats = tap.collect()
    for name, gradient in tiny.gradients(module, output.loss_sum + stats.aux_loss + stats.z_loss).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    assert [int(s) for s in stats.load.shape] == [2, 4]


def test_families_are_a_table():
    with pytest.raises(ConfigError, match=r"model\.family=decodr.*did you mean decoder\?"):
        build(tiny.config(family="decodr"))
    try:
        FAMILIES["mine"] = Family(build=lambda config: torch.nn.Linear(config.hidden_size, 1))
        assert build(tiny.config(family="mine")).in_features == 32
    finally:
        del FAMILIES["mine"]


@pytest.mark.slow
def test_compiled_layers_share_their_graphs_and_change_nothing():
    def run(layers: int) -> int:
        config = tiny.config(num_layers=layers, dropout=0.1)
        module, batch = tiny.model(config).train(), tiny.batch()
        tap = RouterTap(module, config)
        results = []
        for compiled in (False, True):
            if compiled:
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                for layer in module.model.layers:
                    layer.compile(backend="aot_eager", dynamic=False)
            output, stats = module(batch), tap.collect()
            total = output.loss_sum + stats.aux_loss + stats.z_loss
            results.append({"loss": total, **tiny.gradients(module, total)})
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert run(1) == run(3), "a layer is compiled again for each layer: torch.compile gives up after eight"

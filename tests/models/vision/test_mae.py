"""The masked autoencoder: equal to transformers' ViTMAE, and its loss that of the hidden patches alone."""

import pytest
import torch
import transformers
from torch import nn

from configs import ConfigError, from_dict
from models.batch import ImageBatch
from models.families import build
from models.init import fill
from models.tasks.samples import ImageGrid
from models.tasks.table import task_of
from models.vision.mae import image_of, patches_of

KEYS = {
    "family": "mae", "image_size": 12, "patch_size": 3, "num_layers": 2, "hidden_size": 32, "num_heads": 4,
    "intermediate_size": 48, "decoder_layers": 1, "decoder_size": 24, "decoder_heads": 3,
}  # fmt: skip


def network(**keys) -> nn.Module:
    module = build(from_dict({"model": KEYS | keys}).model)
    fill(module, 0)
    return module.eval()


def weights(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' weights under our names."""
    names = {
        "vit.embeddings.cls_token": "class_token", "vit.embeddings.position_embeddings": "positions",
        "vit.embeddings.patch_embeddings.projection": "patches", "vit.layernorm": "stack.norm",
        "vit.layers": "stack.layers", "vit.encoder.layer": "stack.layers", "decoder.decoder_embed": "narrow",
        "decoder.mask_token": "mask_token", "decoder.decoder_pos_embed": "decoder_positions",
        "decoder.decoder_norm": "decoder.norm", "decoder.decoder_layers": "decoder.layers",
        "decoder.decoder_pred": "head", "layernorm_before": "attention_norm", "layernorm_after": "mlp_norm",
        "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
    }  # fmt: skip
    found = {}
    for name, tensor in theirs.items():
        for other, own in names.items():
            name = name.replace(other, own)
        found[name] = tensor
    return found


@torch.no_grad()
def test_it_is_hugging_faces():
    torch.manual_seed(0)
    module = network()
    theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        image_size=12, patch_size=3, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48,
        decoder_num_hidden_layers=1, decoder_hidden_size=24, decoder_num_attention_heads=3,
        decoder_intermediate_size=96, mask_ratio=0.75,
    )).eval()  # fmt: skip
    for name, parameter in theirs.named_parameters():
        if "pos" not in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    module.load_state_dict(weights(theirs.state_dict()))
    images, lots = torch.randn(3, 3, 12, 12), torch.rand(3, 16)
    found, expected = module(images, lots.argsort(1)[:, :4]), theirs(images, noise=lots)
    assert torch.allclose(found, expected.logits, rtol=1e-5, atol=1e-5)
    assert torch.allclose(patches_of(images, 3), theirs.patchify(images))
    assert torch.equal(image_of(patches_of(images, 3), 3), images)


def task(**keys):
    return task_of(from_dict({"model": KEYS | keys}))


def batch(count=6) -> ImageBatch:
    """Of which the last is padding."""
    draw, ids = torch.Generator().manual_seed(0), torch.arange(count)
    ids[-1] = -1
    images = torch.randint(0, 256, (count, 3, 12, 12), generator=draw, dtype=torch.uint8)
    return ImageBatch(images, torch.zeros(count, dtype=torch.long), ids)


@torch.no_grad()
def test_the_loss_is_of_the_hidden_patches_in_any_split():
    learned, module, whole = task(), network(), batch()
    told: list[torch.Tensor] = []

    def net(images, kept, keys=None):
        told.append(kept)
        return module(images, kept, keys)

    sums = learned.loss({"model": net}, whole, "model")
    kept = told[0]
    assert kept.shape == (6, 4)
    assert int(sums.weight) == whole.weight() == 5
    errors = (module(whole.inputs, kept) - patches_of(whole.inputs, 3)).square().mean(2)
    expected = sum(errors[row, [p for p in range(16) if p not in kept[row]]].mean() for row in range(5))
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parts = [
        learned.loss({"model": net}, ImageBatch(*(each[i : i + 3] for each in whole.tensors().values())), "model")
        for i in (0, 3)
    ]
    assert sum(part.loss for part in parts).item() == pytest.approx(sums.loss.item(), rel=1e-5)
    # The network's output depends on what it sees alone.
    hidden = [p for p in range(16) if p not in kept[0]]
    changed = patches_of(whole.inputs, 3)
    changed[0, hidden] += 1
    assert torch.equal(module(image_of(changed, 3), kept)[0], module(whole.inputs, kept)[0])


def test_other_patches_are_hidden_by_another_seed_but_not_in_evaluations():
    seen = []
    for seed in (0, 1):
        learned = task_of(from_dict({"model": KEYS, "run": {"seed": seed}}))
        nets = {"model": lambda images, kept, keys=None: seen.append(kept) or torch.zeros(6, 16, 27)}
        learned.loss(nets, batch(), "model")
        learned.evaluate(nets, batch())
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


@torch.no_grad()
def test_a_sample_shows_what_is_seen_filled_in_and_there():
    drawn = task().samples({"model": lambda images, kept, keys=None: torch.full((6, 16, 27), 0.5)}, batch())
    assert isinstance(drawn, ImageGrid)
    seen, filled, whole = drawn.images_NCHW.view(6, 3, 3, 12, 12).unbind(1)
    assert torch.allclose(whole, batch().images / 255, atol=1e-6)
    hidden = seen == 0.5  # black and white alike half way
    assert hidden.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.allclose(filled[hidden], torch.tensor(0.75))
    assert torch.equal(filled[~hidden], whole[~hidden])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decoder_heads": 5}, r"model\.decoder_size \(24\) is not a multiple of model\.decoder_heads \(5\)"),
        ({"patch_size": 12}, r"model\.patch_size \(12\) makes one patch of the image"),
    ],
)
def test_sizes_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": KEYS | keys})


def test_a_patch_at_least_is_hidden_and_one_is_not():
    for ratio, kept in ((0.001, 15), (0.999, 1), (0.75, 4), (0.5, 8)):
        assert from_dict({"model": KEYS | {"mask_ratio": ratio}}).model.kept == kept

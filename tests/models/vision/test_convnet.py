"""Convolutional networks from stages: equal to their references, with the parameters of the literature."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from configs import ConfigError, from_dict
from configs.sections.families.architectures import ARCHITECTURES
from models.families import build
from models.init import fill
from models.noise import dropout_keys_of
from models.vision.blocks import Scale
from trainer.engine.precision import WorkingCopies

HF = {
    "resnet18": (transformers.ResNetConfig, {
        "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic",
    }),
    "resnet50": (transformers.ResNetConfig, {
        "embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
        "layer_type": "bottleneck",
    }),
    "mobilenet": (transformers.MobileNetV1Config, {}),
    "efficientnet_b0": (transformers.EfficientNetConfig, {
        "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "depthwise_padding": [],
    }),
    "convnext_tiny": (transformers.ConvNextConfig, {}),
}  # fmt: skip
"""Hugging Face's config of an architecture."""


def network(**keys) -> nn.Module:
    module = build(from_dict({"model": {"family": "convnet", **keys}}).model)
    fill(module, 0)
    return module.eval()


def in_order(module: nn.Module, image: torch.Tensor) -> list[nn.Module]:
    """Its layers that have weights, as they are passed through."""
    layers, hooks = [], []
    for part in module.modules():
        if not isinstance(part, Scale) and list(part.parameters(recurse=False)) and not list(part.children()):
            hooks.append(part.register_forward_hook(lambda layer, *_: layers.append(layer)))
    module(image)
    for hook in hooks:
        hook.remove()
    return layers


@pytest.mark.few(2)
@torch.no_grad()
@pytest.mark.parametrize("name", HF)
def test_it_is_hugging_faces(name):
    kind, keys = HF[name]
    torch.manual_seed(0)
    reference = transformers.AutoModelForImageClassification.from_config(kind(num_labels=7, **keys))
    module, images = network(architecture=name, outputs=7), torch.randn(2, 3, 64, 64)
    for part in reference.modules():  # else deep outputs would hardly depend on the image
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    reference.train()(torch.randn(8, 3, 64, 64))
    reference.eval()
    mine, theirs = in_order(module, images), in_order(reference, images)
    assert len(mine) == len(theirs) > 15
    for layer, other in zip(mine, theirs, strict=True):
        for key, value in other.state_dict().items():
            layer.state_dict()[key].copy_(value.view(layer.state_dict()[key].shape))
    scales = [part.weight for part in module.modules() if isinstance(part, Scale)]
    others = [value for key, value in reference.named_parameters() if key.endswith("layer_scale_parameter")]
    for scale, other in zip(scales, others, strict=True):
        scale.copy_(other.uniform_(0.1, 1))
    found, expected = module(images), reference(images).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in reference.parameters())
    assert (expected[0] - expected[1]).abs().max() > 0.05 * expected.abs().max()


PARAMETERS = {
    "lenet": 61_706, "alexnet": 61_100_840, "vgg11": 132_863_336, "vgg16": 138_357_544, "resnet18": 11_689_512,
    "resnet34": 21_797_672, "resnet101": 44_549_160, "resnet152": 60_192_808, "mobilenet": 4_231_976,
    "efficientnet_b0": 5_288_548, "efficientnet_b4": 19_341_616, "efficientnet_b7": 66_347_960,
    "convnext_tiny": 28_589_128, "convnext_base": 88_591_464,
}  # fmt: skip
"""As torchvision has them (LeNet: of the paper, with a fully connected C3 and 10 classes)."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_has_as_many_parameters_as_published(name):
    small = {"outputs": 10, "channels": 1} if name == "lenet" else {"outputs": 1000}
    with torch.device("meta"):
        module = build(from_dict({"model": {"family": "convnet", "architecture": name, **small}}).model)
    assert sum(parameter.numel() for parameter in module.parameters()) == PARAMETERS[name]


@pytest.mark.few(8)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_smallest_image_is_known(name):
    config = from_dict({"model": {"family": "convnet", "architecture": name}}).model
    with torch.device("meta"):
        module, least = build(config), config.smallest
        assert module(torch.empty(2, 3, least, least), torch.arange(2)).shape == (2, 10)
        if least > 1:
            with pytest.raises(RuntimeError, match=r"(?i)size"):
                module(torch.empty(2, 3, least - 1, least - 1))


OWN = [
    {"width": 8, "kernel": 5, "padding": 0}, {"width": 12, "block": "basic", "stride": 2},
    {"block": "inception", "branches": [2, 3, 4, 3, 4, 2]},
    {"width": 16, "block": "inverted", "squeeze": 0.5, "depth": 2},
    {"width": 16, "block": "separable", "pool": "average2"}, {"width": 24, "block": "convnext", "kernel": 3},
]  # fmt: skip


def test_stages_of_its_own():
    module = network(stages=OWN, norm="layer", hidden=[9], activation="tanh", outputs=4, channels=1)
    assert module(torch.randn(3, 1, 16, 16)).shape == (3, 4)
    assert [sum(p.numel() for p in stage.parameters()) for stage in module.stages[:1]] == [8 * 25 + 16]
    assert module.head[0].weight.shape == (9, 24)
    kinds = {type(part) for part in module.modules()}
    assert nn.Tanh in kinds
    assert not kinds & {nn.ReLU, nn.BatchNorm2d}


NORMS = {
    "rms": lambda x: F.rms_norm(x.movedim(1, -1), (16,), eps=1e-5).movedim(-1, 1),
    "group": lambda x: F.group_norm(x, 2), "instance": F.instance_norm,
}  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_torchs(norm):
    [stage], x = network(stages=[{"width": 16}], norm=norm).stages, torch.randn(3, 3, 6, 6)
    assert torch.allclose(stage[1](stage[0](x)), NORMS[norm](stage[0](x)), atol=1e-5)


REFUSED = {
    "no such": ({"architecture": "resnet19"}, r"model\.architecture.*should be one of lenet, .*resnet18"),
    "no branches": ({"stages": [{"block": "inception"}]}, r"block inception needs branches"),
    "branches": ({"stages": [{"branches": [1, 1, 1, 1, 1, 1]}]}, r"block conv has no branches"),
    "even": ({"stages": [{"block": "basic", "kernel": 2}]}, r"kernel 2: block basic needs an odd one"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_stages_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"model": {"family": "convnet", **keys}})


def test_dropout_in_every_place_belongs_to_the_example():
    images, ids = torch.randn(6, 3, 16, 16), torch.arange(6) + 7
    for keys in ({"dropout": 0.5}, {"spatial_dropout": 0.5}, {"stochastic_depth": 0.9}):
        module = network(**keys)
        whole = module(images, dropout_keys_of(0, ids))
        parts = [module(images[i : i + 3], dropout_keys_of(0, ids[i : i + 3])) for i in (0, 3)]
        assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
        assert not torch.allclose(whole, module(images), atol=1e-3)
    places = [part.place for part in module.modules() if hasattr(part, "place")]
    assert [number for number, _ in places] == list(range(1, 9))
    assert [share for _, share in places] == pytest.approx([0.9 * i / 7 for i in range(8)])


def test_it_computes_in_the_precision_of_working_copies():
    """As bf16 at ZeRO-0 gives them."""
    net = network(architecture="lenet", channels=1)
    WorkingCopies(net, torch.bfloat16)
    assert net(torch.zeros(2, 1, 28, 28)).dtype == torch.bfloat16

"""The encoder as transformers' BertForMaskedLM or BertForSequenceClassification, and vit as its
ViTForImageClassification: weights and config.json."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs import ConfigError
from configs.sections.families.encoder import EncoderConfig, LayersConfig, VitConfig

_BERT = {
    "embed_tokens": "bert.embeddings.word_embeddings", "embed_positions": "bert.embeddings.position_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm", "stack.layers": "bert.encoder.layer",
    "attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm", "q_proj": "self.query",
    "k_proj": "self.key", "v_proj": "self.value", "o_proj": "output.dense", "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense", "head.0": "cls.predictions.transform.dense",
    "head.2": "cls.predictions.transform.LayerNorm", "lm_head": "cls.predictions", "pooler": "bert.pooler.dense",
}  # fmt: skip
_VIT = {
    "patches": "vit.embeddings.patch_embeddings.projection", "class_token": "vit.embeddings.cls_token",
    "positions": "vit.embeddings.position_embeddings", "stack.layers": "vit.layers", "stack.norm": "vit.layernorm",
    "attention_norm": "layernorm_before", "mlp_norm": "layernorm_after", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
    "head": "classifier",
}  # fmt: skip
TYPES = "bert.embeddings.token_type_embeddings.weight"


def their_name(name: str, config: LayersConfig) -> str:
    """The name in transformers of one of our parameters."""
    names = _BERT if isinstance(config, EncoderConfig) else _VIT
    pattern = "|".join(rf"(?<![^.]){re.escape(own)}(?![^.])" for own in names)
    return re.sub(pattern, lambda found: names[found[0]], name)


def to_hf(config: LayersConfig, module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json of a resolved config, and our parameters under transformers' names. The encoder has no token types:
    theirs are zeros.

    Raises:
        ConfigError: the class computes something else.
    """
    tree = to_config(config)
    found = {their_name(name, config): tensor.detach() for name, tensor in module.named_parameters()}
    if isinstance(config, EncoderConfig):
        found[TYPES] = torch.zeros(2, config.hidden_size)
    return tree, found


def from_theirs(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], config: LayersConfig) -> dict[str, Tensor]:
    """The values of our parameters `ours` in a state of transformers. Token type 0, which BERT adds to every token of a
    single text, is added to the positions."""
    found = {name: state[their_name(name, config)] for name in ours}
    if isinstance(config, EncoderConfig):
        found["embed_positions.weight"] = found["embed_positions.weight"] + state[TYPES][0]
    return found


def to_config(config: LayersConfig) -> dict[str, Any]:
    """config.json of a resolved config. Raises ConfigError as `to_hf`."""
    bert = isinstance(config, EncoderConfig)
    tells = not isinstance(config, EncoderConfig) or config.outputs is not None
    kind = "ViTForImageClassification" if not bert else f"BertFor{'SequenceClassification' if tells else 'MaskedLM'}"
    needed: dict[str, Any] = {"activation": "gelu", "norm": "layer", "pre_norm": not bert}
    needed |= {"pool": "token"} if tells else {"tie_embeddings": True}
    needed |= {"positions": "learned"} if bert else {}
    for key, value in needed.items():
        if (own := getattr(config, key)) != value:
            raise ConfigError(f"model.{key}={own}: {kind} has {value}")
    tree: dict[str, Any] = {
        "architectures": [kind], "model_type": "bert" if bert else "vit", "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "intermediate_size": config.inner, "hidden_act": "gelu", "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0,
        "initializer_range": config.init_std,
    }  # fmt: skip
    assert isinstance(config, EncoderConfig | VitConfig)
    if config.outputs is not None:
        labels = {str(number): f"LABEL_{number}" for number in range(config.outputs)}
        tree |= {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    if isinstance(config, EncoderConfig):
        return tree | {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_positions,
                       "type_vocab_size": 2, "tie_word_embeddings": True}  # fmt: skip
    return tree | {
        "image_size": config.image_size, "patch_size": config.patch_size, "num_channels": config.channels,
    }  # fmt: skip

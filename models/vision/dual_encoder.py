"""Two networks, on images and on texts, whose outputs are compared (CLIP, arXiv:2103.00020).

Shapes: B pairs, T bytes of a text, H hidden size, D size of an embedding.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.sections.families.encoder import DualEncoderConfig
from models.batch import CaptionBatch
from models.decoder.attention import visibility
from models.init import initialise
from models.noise import dropout
from models.sequence.encoder import EVERYWHERE, Shared, Stack

from .convnet import ConvNet
from .vit import Vit

WIDEST = 100.0
"""Most that cosines are multiplied by, as in the paper."""


class TextTower(nn.Module):
    """From [B, T] bytes + 1, or 0 for padding, to [B, D]: the mean over what is not padding, by a linear layer."""

    def __init__(self, config: DualEncoderConfig, outputs: int):
        super().__init__()
        self.config, size = config.text, config.text.hidden_size
        self.embed_tokens, self.embed_positions = nn.Embedding(257, size), nn.Embedding(config.text_length, size)
        self.stack, self.head = Stack(config.text), nn.Linear(size, outputs)

    def forward(self, ids_BT: Tensor, keys: Tensor | None = None) -> Tensor:
        """`keys`: of `models.noise.dropout`."""
        places = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTH = dropout(self.embed_tokens(ids_BT) + self.embed_positions(places), keys, 1, self.config.dropout)
        padding_BT = ids_BT == 0  # a document of its own, which the text does not see
        visible = visibility(ids_BT.shape[1], padding_BT.long(), EVERYWHERE, x_BTH)
        x_BTH = self.stack(x_BTH, Shared(None, None, visible), keys)
        x_BTH = x_BTH.masked_fill(padding_BT[..., None], 0)
        return self.head(x_BTH.sum(1) / (~padding_BT).sum(1, keepdim=True).clamp(min=1))


class DualEncoder(nn.Module):
    """From images in [-1, 1] and texts to [2, B, D] unit vectors, the images' multiplied by 1 / temperature."""

    def __init__(self, config: DualEncoderConfig):
        super().__init__()
        self.config = config
        self.image: nn.Module = Vit(config.vit) if config.vit else ConvNet(config.image)  # type: ignore[arg-type]
        self.text = TextTower(config, config.image.outputs)
        self.log_scale = nn.Parameter(torch.empty(1))

    def init_weights(self, seed: int) -> None:
        image: Any = self.image
        image.init_weights(seed)
        initialise(self.text, self.config.text.init_std, seed)
        nn.init.constant_(self.log_scale, math.log(1 / self.config.temperature))

    def set_activation_checkpointing(self, every: int) -> None:
        """As `Encoder.set_activation_checkpointing`."""
        for tower in (self.image, self.text):
            if isinstance(stack := getattr(tower, "stack", None), Stack):
                stack.recompute_every = every

    def forward(self, batch: CaptionBatch, keys: Tensor | None = None) -> Tensor:
        """`keys`: of `models.noise.dropout`."""
        image, text = self.image(batch.inputs, keys), self.text(batch.text_ids, keys)
        scale = self.log_scale.float().exp().clamp(max=WIDEST)
        return torch.stack([F.normalize(image.float()) * scale, F.normalize(text.float())])

"""The vision Transformer (arXiv:2010.11929): an image as a sequence of patches, through the encoder's layers.

Shapes: B images, P patches, H hidden size.
"""

import torch
from torch import Tensor, nn

from configs.sections.families.encoder import VitConfig
from models.decoder.attention import Visibility
from models.init import initialise
from models.mlp import predictor_of
from models.noise import dropout
from models.sequence.encoder import Shared, Stack


class Vit(nn.Module):
    """From images [B, channels, size, size] in [-1, 1] to [B, outputs]."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config, size = config, config.hidden_size
        self.patches = nn.Conv2d(config.channels, size, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, size)) if config.pool == "token" else None
        self.positions = nn.Parameter(torch.empty(1, config.num_patches + (config.pool == "token"), size))
        self.stack, self.head = Stack(config), nn.Linear(size, config.outputs)
        self.predictor = predictor_of(config)

    def init_weights(self, seed: int) -> None:
        initialise(self, self.config.init_std, seed)

    def set_activation_checkpointing(self, every: int) -> None:
        """As `Encoder.set_activation_checkpointing`."""
        self.stack.recompute_every = every

    def forward(self, images: Tensor, keys: Tensor | None = None, predict: bool = False) -> Tensor:
        """`keys`: of `models.noise.dropout`; `predict`: with the predictor, see `models.mlp.Predictor`."""
        x_BPH = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x_BPH = torch.cat([self.class_token.expand(len(x_BPH), -1, -1), x_BPH], 1)
        x_BPH = dropout(x_BPH + self.positions, keys, 1, self.config.dropout)
        x_BPH = self.stack(x_BPH, Shared(None, None, Visibility(causal=False)), keys)
        outputs = self.head(x_BPH[:, 0] if self.class_token is not None else x_BPH.mean(1))
        return self.predictor(outputs) if predict and self.predictor else outputs

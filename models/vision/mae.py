"""The masked autoencoder (arXiv:2111.06377), built from the encoder's layers.

Shapes: B images, P patches, K of them not hidden, H hidden size, D that of the decoder, N numbers of a patch.
"""

import torch
from torch import Tensor, nn

from configs.sections.families.encoder import MaeConfig
from models.decoder.attention import Visibility
from models.init import initialise
from models.noise import dropout
from models.sequence.encoder import Shared, Stack


class Mae(nn.Module):
    """From images [B, channels, size, size] to all their patches, of which it sees some."""

    def __init__(self, config: MaeConfig):
        super().__init__()
        self.config, size, small = config, config.hidden_size, config.decoder_size
        self.patches = nn.Conv2d(config.channels, size, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, size))
        self.positions = nn.Parameter(torch.empty(1, 1 + config.num_patches, size))
        self.stack, self.narrow = Stack(config), nn.Linear(size, small)
        self.mask_token = nn.Parameter(torch.empty(1, 1, small))
        self.decoder_positions = nn.Parameter(torch.empty(1, 1 + config.num_patches, small))
        self.decoder, self.head = Stack(config.decoder), nn.Linear(small, config.channels * config.patch_size**2)

    def init_weights(self, seed: int) -> None:
        initialise(self, self.config.init_std, seed)

    def set_activation_checkpointing(self, every: int) -> None:
        """As `Encoder.set_activation_checkpointing`."""
        self.stack.recompute_every = self.decoder.recompute_every = every

    def forward(self, images: Tensor, kept_BK: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, P, N], as `patches_of` orders them.

        Args:
            kept_BK: int64, numbers of the patches that are not hidden.
            keys: of `models.noise.dropout`.
        """
        shared, place_BK1 = Shared(None, None, Visibility(causal=False)), kept_BK[..., None]
        x_BPH = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        x_BKH = x_BPH.gather(1, place_BK1.expand(-1, -1, x_BPH.shape[-1]))
        first = (self.class_token + self.positions[:, :1]).expand(len(images), -1, -1)
        x_BKH = dropout(torch.cat([first, x_BKH], 1), keys, 1, self.config.dropout)
        x_BKD = self.narrow(self.stack(x_BKH, shared, keys))
        x_BPD = self.mask_token.to(x_BKD.dtype).expand(len(images), self.config.num_patches, -1)
        x_BPD = x_BPD.scatter(1, place_BK1.expand(-1, -1, x_BKD.shape[-1]), x_BKD[:, 1:])
        x_BPD = torch.cat([x_BKD[:, :1], x_BPD], 1) + self.decoder_positions
        return self.head(self.decoder(x_BPD, shared)[:, 1:])


def patches_of(images: Tensor, size: int) -> Tensor:
    """[B, C, height, width] as [B, P, N]: patches row by row, each size x size x C."""
    parts = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def image_of(patches_BPN: Tensor, size: int) -> Tensor:
    """The inverse of `patches_of`, of square images."""
    side = round(patches_BPN.shape[1] ** 0.5)
    parts = patches_BPN.unflatten(2, (size, size, -1)).unflatten(1, (side, side))
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

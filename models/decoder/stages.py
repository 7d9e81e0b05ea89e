"""Pipeline stages of a decoder: each is the plain model without the parts that are on other stages."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.stages import stage_layers
from models.batch import Batch
from models.init import initialise
from models.loss import LossOutput, chunked_cross_entropy, nan_if_infinite
from models.moe.balance import RouterStats, RouterTap

from .model import Backbone, Decoder


class Elsewhere(nn.Module):
    """Placeholder for a part that is on another stage."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class Measured(NamedTuple):
    """What one forward pass of a stage measured, without gradient."""

    loss: LossOutput | None
    """None except on the last stage."""
    router: RouterStats | None
    """Of this stage's MoE layers; None if it has none, and in evaluation."""
    choices: list[Tensor]
    """In evaluation [S, k] of each of them, else empty."""


class Stage(nn.Module):
    """Layers `stage_layers(...)[index]` of a decoder, under the same names.

    Every stage holds the micro-batches itself (`feed`) and makes positions, masks and dropout keys from them once per
    forward pass, so that only hidden states pass between stages.

    Args:
        decoder: whole; its modules become this stage's, on any device, meta included.
    """

    def __init__(self, decoder: Decoder, index: int, stages: int):
        super().__init__()
        self.config = config = decoder.config
        assert not config.tie_embeddings, "resolve() refuses it: the embedding and the head are on different stages"
        self.index, self.first, self.last = index, index == 0, index == stages - 1
        self.layers = stage_layers(config.num_layers, stages)[index]
        self.model: Backbone = decoder.model
        for i in set(range(config.num_layers)) - set(self.layers):
            self.model.layers[i] = Elsewhere()
        if not self.first:
            self.model.embed_tokens = Elsewhere()  # type: ignore[assignment]
        if not self.last:
            self.model.norm = Elsewhere()  # type: ignore[assignment]
        else:
            self.lm_head = decoder.lm_head
        self.moe_layers = [i for i in range(config.num_layers) if config.is_moe_layer(i)]
        """Those of the whole model."""
        self._tap: RouterTap | None = None
        self._batches: deque[Batch] = deque()
        self._loss_factor: Tensor | float = 0.0
        self._balance_factor = 0.0
        self.measured: list[Measured] = []

    @property
    def own_moe_layers(self) -> list[int]:
        return [i for i in self.moe_layers if i in self.layers]

    def feed(self, batches: Iterable[Batch], loss_factor: Tensor | float = 1.0, balance_factor: float = 1.0) -> None:
        """Set the micro-batches of the next forward passes, in order.

        Args:
            loss_factor: what the last stage's summed token loss is multiplied by, a scalar.
            balance_factor: what an earlier stage's router losses are multiplied by. Any scaling of the loss by the
                engine reaches earlier stages only through the gradient of the hidden states.
        """
        self._batches = deque(batches)
        self._loss_factor, self._balance_factor = loss_factor, balance_factor
        self.measured = []
        if self._tap is None and self.own_moe_layers:
            # Not in __init__: the engine may replace the MoE blocks.
            self._tap = RouterTap(self, self.config)

    def forward(self, x: Tensor) -> Tensor:
        """Forward the next micro-batch from the previous stage's hidden states to this stage's.

        Args:
            x: [B, T, H]; the first stage ignores it.

        Returns:
            [B, T, H]; the last stage: the scaled loss, a scalar.
        """
        batch = self._batches.popleft()
        hidden_BTH = self.model(batch, hidden_BTH=None if self.first else x)
        learning = torch.is_grad_enabled()
        router = self._tap.collect() if self._tap and learning else None
        choices = self._tap.choices() if self._tap and not learning else []
        balance = None if router is None else self._balance(router)
        out = None
        if self.last:
            labels_S = batch.labels.flatten()
            out = chunked_cross_entropy(hidden_BTH.flatten(0, 1), self.lm_head.weight, labels_S, self.config.loss_chunk)
        self.measured.append(_without_gradient(Measured(out, router, choices)))
        if out is None:
            return hidden_BTH if balance is None else _Inject.apply(hidden_BTH, balance * self._balance_factor)
        loss = out.loss_sum * self._loss_factor
        return nan_if_infinite(loss if balance is None else loss + balance)

    def _balance(self, router: RouterStats) -> Tensor:
        """This stage's part of the weighted router losses, which are means over all MoE layers of the model."""
        share = len(router.load) / len(self.moe_layers)
        config = self.config
        losses = config.aux_loss_weight * router.aux_loss + config.z_loss_weight * router.z_loss
        return nan_if_infinite(losses * share)

    def set_activation_checkpointing(self, every: int) -> None:
        """As for the whole model: every k-th of all its layers."""
        self.model.activation_checkpointing = every

    def init_weights(self, seed: int) -> None:
        """Fill this stage's parameters with the values they have in the whole model, and seed dropout."""
        initialise(self, self.config.init_std, seed)
        self.model.dropout_seed = seed


class PlainNames(nn.Module):
    """A list of modules whose indices do not appear in the names of their parameters."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.children():
            yield from part.named_parameters(*args, **kwargs)


class Stages(PlainNames, nn.ModuleList):
    """The stages of one process, in layer order."""

    def __iter__(self) -> Iterator[Stage]:
        return super().__iter__()  # type: ignore[return-value]

    def compiled_parts(self) -> list[nn.Module]:
        return [layer for stage in self for layer in stage.model.layers]

    def set_activation_checkpointing(self, every: int) -> None:
        for stage in self:
            stage.set_activation_checkpointing(every)

    def init_weights(self, seed: int) -> None:
        for stage in self:
            stage.init_weights(seed)


def _without_gradient(measured: Measured) -> Measured:
    loss, router, choices = measured
    return Measured(
        loss and LossOutput(*(value.detach() for value in loss)),
        router and RouterStats(*(value.detach() for value in router)),
        choices,
    )


class _Inject(torch.autograd.Function):
    """Identity on the hidden states; its backward pass also runs that of a scalar loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor):
        return d_hidden, torch.ones_like(ctx.like)

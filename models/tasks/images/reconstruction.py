"""Reconstruction: an example is made again from the little that a bottleneck lets through."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs import Config
from configs.sections.pairs import TASK_ENDS
from models.batch import ImageBatch, RowBatch
from models.noise import normal

from ..samples import ImageGrid, Table
from ..task import Modules, Nets, OfAnyKind, Sums, Value

Examples = ImageBatch | RowBatch


class Reconstruction(OfAnyKind):
    """The loss of an example is `reconstruction`, half the squared error summed over its numbers (its negative
    logarithmic likelihood under a normal distribution of variance 1, but for a constant), plus the weighted terms of
    the bottleneck. Recorded besides: each term before its weight, and `mse`, the error's mean square per number.

    Terms, summed over an example: `kl` (VAE, nats), `codebook` (VQ-VAE: the squared distance to the code), `l1`,
    `sparsity` (KL, of the micro-batch's mean), `contractive` (in training only). A VQ-VAE records `perplexity`,
    the exponential of the entropy of the codes' use, and `codes_used`, the share of them that is used at all.
    """

    takes, gives = TASK_ENDS["reconstruction"]

    def __init__(self, config: Config):
        super().__init__(config)
        self.model: Any = config.model

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in the loss, by name."""
        model = self.model
        if model.bottleneck == "vae":
            return {"kl": model.beta}
        if model.bottleneck == "vq":
            return {"codebook": 1 + model.commitment}
        sparsity = {"none": {}, "l1": {"l1": model.sparsity_weight}, "kl": {"sparsity": model.sparsity_weight}}
        return sparsity[model.sparsity] | ({"contractive": model.contractive} if model.contractive else {})

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = dict.fromkeys(("reconstruction", *self.weights), ())
        if self.model.bottleneck == "vq":
            found["used"] = (self.model.codes,)
        return found

    def loss(self, nets: Nets, batch: Examples, phase: str) -> Sums:
        model, real = self.model, (batch.example_ids >= 0).float()
        noise = self._noise(batch, "posterior") if model.bottleneck == "vae" else None
        contracts = model.contractive and torch.is_grad_enabled()
        projection = self._noise(batch, "projection") if contracts else None
        made, *told = nets["model"](self.corrupted(batch), noise, projection)
        extra = {"reconstruction": (made.float() - batch.inputs).square().flatten(1).sum(1) / 2}
        loss = extra["reconstruction"]
        for name, weight in self.weights.items():
            extra[name] = getattr(self, f"_{name}")(real, *told)
            loss = loss + weight * extra[name]
        sums = {name: (value * real).sum() for name, value in extra.items()}
        if model.bottleneck == "vq":
            chosen = F.one_hot(told[-1].view(len(real), -1), model.codes).sum(1)
            sums["used"] = (chosen * real[:, None]).sum(0)
        return Sums((loss * real).sum(), real.sum(), sums)

    def corrupted(self, batch: Examples) -> Tensor:
        """The inputs with their noise, a function of (seed, example)."""
        if not self.model.input_noise:
            return batch.inputs
        noise = normal(self.config.run.seed, batch.example_ids, "input noise", tuple(batch.inputs.shape[1:]))
        return batch.inputs + self.model.input_noise * noise

    def _noise(self, batch: Examples, use: str) -> Tensor:
        return normal(self.config.run.seed, batch.example_ids, use, (self.model.latents,))

    @staticmethod
    def _kl(real: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """arXiv:1312.6114, appendix B."""
        return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2

    def _codebook(self, real: Tensor, encoded: Tensor, codes: Tensor, numbers: Tensor) -> Tensor:
        """arXiv:1711.00937, equation 3, divided by the sum of both weights: its gradients reach codes and encoder in
        the proportion 1 to `commitment`."""
        share = self.model.commitment / (1 + self.model.commitment)
        to_encoder = (encoded - codes.detach()).square().flatten(1).sum(1)
        to_codes = (encoded.detach() - codes).square().flatten(1).sum(1)
        return share * to_encoder + (1 - share) * to_codes

    @staticmethod
    def _l1(real: Tensor, latents: Tensor, *_: Tensor) -> Tensor:
        return latents.abs().sum(1)

    @staticmethod
    def _contractive(real: Tensor, latents: Tensor, gradient: Tensor | None = None) -> Tensor:
        """|v^T J|^2 with v standard normal, whose expectation is |J|^2 (arXiv:1908.02729, section 2.3)."""
        return latents.new_zeros(len(latents)) if gradient is None else gradient.square().flatten(1).sum(1)

    def _sparsity(self, real: Tensor, latents: Tensor, *_: Tensor) -> Tensor:
        """Sum over the latents of the divergence from a coin of `sparsity_target` to one of their mean (Ng, 2011)."""
        wanted, mean = self.model.sparsity_target, (latents * real[:, None]).sum(0) / real.sum().clamp(min=1)
        mean = mean.clamp(1e-6, 1 - 1e-6)
        divergence = wanted * (wanted / mean).log() + (1 - wanted) * ((1 - wanted) / (1 - mean)).log()
        return divergence.sum().expand(len(real))

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        used, found = extra.get("used"), super().metrics({k: v for k, v in extra.items() if k != "used"}, weight)
        if not found.get("contractive", 1):  # not measured in evaluations
            del found["contractive"]
        found["mse"] = 2 * found["reconstruction"] / self.model.inputs
        if used:
            share = torch.tensor(used, dtype=torch.float64) / max(sum(used), 1)
            found["perplexity"] = float(torch.special.entr(share).sum().exp())
            found["codes_used"] = float((share > 0).double().mean())
        return found

    def samples(self, nets: Modules, batch: Examples) -> ImageGrid | Table:
        """Images: the originals, with their noise if they have any, reconstructed, and what a VAE makes of latents from
        its prior; a row each. Rows: the error of each."""
        net, seen = nets["model"], self.corrupted(batch)
        made = net(seen)[0].float()
        if isinstance(batch, RowBatch):
            errors = (made - batch.inputs).square().mean(1)
            return Table(["example", "mse"], list(zip(batch.example_ids.tolist(), errors.tolist(), strict=True)))
        rows = [batch.inputs, *([seen] if self.model.input_noise else []), made]
        if self.model.bottleneck == "vae":
            decoded: Any = net.decoded
            rows.append(decoded(self._noise(batch, "prior")).float().view_as(made))
        return ImageGrid((torch.cat(rows) + 1) / 2, across=len(made))

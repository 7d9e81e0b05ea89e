"""Contrastive learning of images and texts (CLIP, arXiv:2103.00020): which text belongs to which image."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs import Config, ConfigError
from configs.sections.pairs import TASK_ENDS
from models.batch import CaptionBatch
from models.noise import dropout_keys_of

from ..samples import Table
from ..task import Modules, Nets, Sums, Task, Value, alone
from .contrastive import FAR
from .views import PROBED

SHOWN = 3
"""Texts that samples name for an image."""


class ImageTextContrastive(Task):
    """The cross-entropy, in nats, of finding an image's text among those of its micro-batch, and a text's image: the
    mean of both.

    As in `contrastive`, train.micro_batch says how many pairs there are to choose from, the same in every topology; or
    there are those of the global batch (train.negatives), of which a process has one micro-batch. A pair with the same
    text is not told apart. Recorded besides: `matched`, how often an image's text is found.
    Evaluations search the first 1,024 held-out pairs: `image_recall` and `text_recall` say how often the nearest text
    of an image, and the nearest image of a text, has the right text; `zero_shot_accuracy`, if there are several labels,
    how often the nearest of the labels' mean texts is that of the image's own.
    """

    takes, gives = TASK_ENDS["image_text_contrastive"]
    reads = "captions"

    def __init__(self, config: Config):
        super().__init__(config)
        if config.train.micro_batch == 1:
            raise ConfigError("train.micro_batch=1: an image needs others to be told from: set it to 2 or more")
        if config.train.negatives == "global_batch":
            self._check_one_micro_batch()

    def _check_one_micro_batch(self) -> None:
        """Raise ConfigError if another topology would compute something else."""
        train, dp = self.config.train, self.config.parallel.dp or 1
        model: Any = self.config.model
        if (train.micro_batch or train.global_batch) * dp < train.global_batch:
            raise ConfigError(
                f"train.negatives=global_batch needs one micro-batch per process and step: set train.micro_batch="
                f"{math.ceil(train.global_batch / dp)}, or train.negatives=micro_batch"
            )
        if model.convnet and model.convnet.shape.norm == "batch":
            raise ConfigError(
                "train.negatives=global_batch: BatchNorm's micro-batch would depend on the number of processes: set "
                "model.convnet.norm to layer or none"
            )

    @property
    def counts(self) -> tuple[int, str]:
        return 1, "images"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        return {"matched": ()}

    def loss(self, nets: Nets, batch: CaptionBatch, phase: str) -> Sums:
        keys = dropout_keys_of(self.config.run.seed, batch.example_ids)
        everyones = self.everyones if self.config.train.negatives == "global_batch" else alone
        return compared(nets["model"](batch, keys), batch, everyones)

    def evaluate(self, nets: Nets, batch: CaptionBatch) -> Sums:
        both = nets["model"](batch)
        image_BD, text_BD = F.normalize(both[0]).double(), both[1].double()
        sums, ids = compared(both, batch), batch.example_ids
        table = image_BD.new_zeros(PROBED + 1, 2 * image_BD.shape[1] + 2)
        rows = ids.where((ids >= 0) & (ids < PROBED), PROBED)
        told = torch.stack([batch.labels + 1, number_of(batch.text_ids)], 1)
        table[rows] = torch.cat([image_BD, text_BD, told], 1)
        return sums._replace(extra={**sums.extra, "pairs": table[:PROBED]})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        found = super().metrics({"matched": extra["matched"]}, weight)
        if rows := [row for row in extra.get("pairs", ()) if row[-2]]:
            table = torch.tensor(rows, dtype=torch.float64)
            images, texts = table[:, :-2].chunk(2, 1)
            found |= retrieved(images, texts, table[:, -1])
            if (labels := table[:, -2].long() - 1).unique().numel() > 1:
                found["zero_shot_accuracy"] = zero_shot(images, texts, labels)
        return found

    def samples(self, nets: Modules, batch: CaptionBatch) -> Table:
        """The texts, among those of the same examples, that are nearest to each image."""
        image_BD, text_BD = nets["model"](batch)
        texts = [text_of(row) for row in batch.text_ids.tolist()]
        near = (image_BD @ text_BD.T).topk(min(SHOWN, len(texts))).indices.tolist()
        rows = [[text, *(texts[each] for each in found)] for text, found in zip(texts, near, strict=True)]
        return Table(["text", *(f"found {place + 1}" for place in range(min(SHOWN, len(texts))))], rows)


def compared(both_2BD: Tensor, batch: CaptionBatch, everyones: Callable[[Tensor], tuple[Tensor, int]] = alone) -> Sums:
    """The loss of a network's outputs; `everyones`: see `Task.everyones`."""
    image_BD, text_BD = both_2BD.float()
    (images_ND, first), (texts_ND, _) = everyones(image_BD), everyones(text_BD)
    (ids_NT, _), (examples_N, _) = everyones(batch.text_ids), everyones(batch.example_ids)
    real, own = batch.example_ids >= 0, torch.arange(len(image_BD), device=both_2BD.device) + first
    hidden = (batch.text_ids[:, None] == ids_NT).all(2) | (examples_N < 0)
    hidden &= own[:, None] != torch.arange(len(ids_NT), device=own.device)
    of_images, of_texts = ((a @ b.T).masked_fill(hidden, FAR) for a, b in ((image_BD, texts_ND), (text_BD, images_ND)))
    losses = sum(F.cross_entropy(each, own, reduction="none") for each in (of_images, of_texts)) / 2
    matched = (of_images.argmax(1) == own) & real
    return Sums((losses * real).sum(), real.sum(), {"matched": matched.sum()})


def number_of(text_ids: Tensor) -> Tensor:
    """[B] int64 below 2^31: a number for each text of [B, T] ids, the same for the same text, whatever the padding."""
    found = torch.zeros_like(text_ids[:, 0])
    for column in text_ids.T:
        found = torch.where(column > 0, (found * 1_000_003 + column) % (2**31 - 1), found)
    return found


def retrieved(images: Tensor, texts: Tensor, numbers: Tensor) -> dict[str, float]:
    """Recall at 1 in both directions.

    Args:
        images, texts: [N, D] unit vectors. numbers: [N], equal for equal texts.
    """
    cosines = images @ texts.T
    nearest = {"image_recall": cosines.argmax(1), "text_recall": cosines.argmax(0)}
    return {name: float((numbers[found] == numbers).double().mean()) for name, found in nearest.items()}


def zero_shot(images: Tensor, texts: Tensor, labels: Tensor) -> float:
    """Accuracy of the nearest mean of the texts of each label that occurs (section 3.1.4: an ensemble of prompts)."""
    known, labels = labels.unique(return_inverse=True)
    means = torch.stack([texts[labels == label].sum(0) for label in range(len(known))])
    return float(((images @ F.normalize(means).T).argmax(1) == labels).double().mean())


def text_of(ids: list[int]) -> str:
    return bytes(each - 1 for each in ids if each).decode(errors="replace")

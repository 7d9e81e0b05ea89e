"""Classification and regression: the class, or the numbers, that belong to a row, an image, a text or a graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.reading.parse import clip
from configs.sections.pairs import TASK_ENDS
from models.batch import GraphBatch, ImageBatch, Measured, RowBatch, TextBatch
from models.noise import dropout_keys_of

from .images.mixing import Mix, mixed
from .samples import Table
from .task import Modules, Nets, OfAnyKind, Sums, Value

Examples = ImageBatch | RowBatch | GraphBatch | TextBatch
SHOWN = 200
"""Characters of a text in a table of samples."""


def outputs(found: Tensor | Measured) -> Tensor:
    """What a network gave, fp32."""
    return (found.outputs if isinstance(found, Measured) else found).float()


class Labelled(OfAnyKind):
    """What both have in common. A network is called with a batch's inputs and, in training, dropout's keys; both are
    [B, ...], and it returns [B, classes or numbers]."""

    def loss(self, nets: Nets, batch: Examples, phase: str) -> Sums:
        keys = dropout_keys_of(self.config.run.seed, batch.example_ids)
        mix = self.mix(batch)
        found = nets["model"](mix.inputs if mix else batch.inputs, keys)
        return self._summed(found, self.compared(outputs(found), batch, training=True, mix=mix))

    def evaluate(self, nets: Nets, batch: Examples) -> Sums:
        found = nets["model"](batch.inputs)
        return self._summed(found, self.compared(outputs(found), batch, training=False))

    def mix(self, batch: Examples) -> Mix | None:
        """How the examples of a micro-batch are mixed in training; None: they are not."""
        return None

    def _summed(self, found: Tensor | Measured, sums: Sums) -> Sums:
        numbers = found.numbers if isinstance(found, Measured) else {}
        return sums._replace(extra={**sums.extra, **{name: each * sums.weight for name, each in numbers.items()}})

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """What the network measures."""
        return dict.fromkeys(self.config.model.measures, ())

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        return {name: extra[name] / max(weight, 1) for name in self.config.model.measures}

    def compared(self, found: Tensor, batch: Examples, training: bool, mix: Mix | None = None) -> Sums:
        """The loss of what the network gave, fp32 [B, classes or numbers]."""
        raise NotImplementedError


class Classification(Labelled):
    """The label of an example, by cross-entropy in nats. Evaluations measure it without label smoothing and weights of
    classes. Recorded besides: `accuracy`, and `macro_f1`, the mean F1 over the classes that occur. Where examples are
    mixed, the loss is that of both labels by their shares, and the label in training is that of the larger one."""

    takes, gives = TASK_ENDS["classification"]

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Per class: examples found to be of it rightly, found to be of it, and labelled so."""
        return {"by_class": (3, self._classes), **super().extra}

    @property
    def _classes(self) -> int:
        model: Any = self.config.model
        return getattr(model, "outputs", None) or model.classes  # a plugin's family may call them so

    def mix(self, batch: Examples) -> Mix | None:
        train = self.config.train
        if not (train.mixup or train.cutmix):
            return None
        assert not isinstance(batch, GraphBatch | TextBatch)  # as `check_mixing` has it
        return mixed(batch, train, self.config.run.seed)

    def _losses(self, found: Tensor, labels: Tensor, training: bool) -> Tensor:
        """[B]."""
        train = self.config.train
        smoothing = train.label_smoothing if training else 0.0
        losses = F.cross_entropy(found, labels, reduction="none", ignore_index=-1, label_smoothing=smoothing)
        if training and train.class_weights:
            losses = losses * losses.new_tensor(train.class_weights)[labels.clamp(min=0)]
        return losses

    def compared(self, found: Tensor, batch: Examples, training: bool, mix: Mix | None = None) -> Sums:
        labels = batch.labels
        losses = self._losses(found, labels, training)
        if mix:
            others = labels[mix.partner]
            losses = mix.share * losses + (1 - mix.share) * self._losses(found, others, training)
            labels = labels.where(mix.share >= 0.5, others)
        numbers = torch.arange(self._classes, device=labels.device)
        labelled, chosen = labels[:, None] == numbers, found.argmax(1)[:, None] == numbers
        chosen = chosen & (labels >= 0)[:, None]
        by_class = torch.stack([(chosen & labelled).sum(0), chosen.sum(0), labelled.sum(0)])
        return Sums(losses.sum(), (labels >= 0).sum(), {"by_class": by_class})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        by_class = list(zip(*extra["by_class"], strict=True))
        f1 = [2 * right / (chosen + labelled) for right, chosen, labelled in by_class if chosen + labelled]
        accuracy = sum(right for right, *_ in by_class) / max(weight, 1)
        return {"accuracy": accuracy, "macro_f1": sum(f1) / max(len(f1), 1), **super().metrics(extra, weight)}

    def samples(self, nets: Modules, batch: Examples) -> Table:
        sure, found = outputs(nets["model"](batch.inputs)).softmax(1).max(1)
        columns = [x.tolist() for x in (batch.example_ids, batch.labels, found, sure)]
        return _table(["example", "label", "found", "probability"], columns, batch)


class Regression(Labelled):
    """The numbers that belong to an example, by the squared error, averaged over them, in units of their variance if
    data.rows.standardise (of texts data.texts.standardise). Recorded besides: `r2`, the share of the variance that is
    explained, averaged over the numbers, and `rmse` in their own units."""

    takes, gives = TASK_ENDS["regression"]

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Per number: sums of the squared error, of the number and of its square, and of the squared error in its own
        units."""
        model: Any = self.config.model
        return {"by_number": (4, model.outputs), **super().extra}

    def compared(self, found: Tensor, batch: Examples, training: bool, mix: Mix | None = None) -> Sums:
        assert not isinstance(batch, ImageBatch)
        assert batch.scale is not None
        real = (batch.example_ids >= 0)[:, None]
        errors, numbers = (found - batch.labels).square() * real, batch.labels.double() * real
        own = errors.double() * batch.scale[1].double().square()
        by_number = torch.stack([errors.double().sum(0), numbers.sum(0), numbers.square().sum(0), own.sum(0)])
        return Sums(errors.mean(1).sum(), real.sum(), {"by_number": by_number})

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        errors, sums, squares, own = extra["by_number"]
        spread = [square - total**2 / max(weight, 1) for total, square in zip(sums, squares, strict=True)]
        found = {"rmse": (sum(own) / len(own) / max(weight, 1)) ** 0.5, **super().metrics(extra, weight)}
        if min(spread) > 1e-9 * max(weight, 1):  # else there is no variance to explain
            found["r2"] = sum(1 - error / each for error, each in zip(errors, spread, strict=True)) / len(errors)
        return found

    def samples(self, nets: Modules, batch: Examples) -> Table:
        assert not isinstance(batch, ImageBatch)
        assert batch.scale is not None
        mean, deviation = batch.scale
        rows = torch.cat([batch.labels, outputs(nets["model"](batch.inputs))]).unflatten(0, (2, -1)) * deviation + mean
        columns = [batch.example_ids.tolist(), *(column.tolist() for kind in rows for column in kind.T)]
        data, own = self.config.data, range(batch.labels.shape[1])
        named = {RowBatch: data.rows.labels, TextBatch: data.texts.labels}.get(type(batch), own)
        names = [f"{kind} {each}" for kind in ("label", "found") for each in named]
        return _table(["example", *names], columns, batch)


def _table(names: list[str], columns: list[list], batch: Examples) -> Table:
    """With a column of the texts, if the examples are such."""
    if isinstance(batch, TextBatch):
        assert batch.decode is not None
        pairs = zip(batch.token_ids.tolist(), batch.mask.sum(1).tolist(), strict=True)
        names, columns = [*names, "text"], [*columns, batch.decode([row[:length] for row, length in pairs])]
        columns[-1] = [clip(each, SHOWN) for each in columns[-1]]
    return Table(names, list(zip(*columns, strict=True)))

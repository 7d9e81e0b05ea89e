"""Which families, tasks and kinds of data fit together: what each takes and gives, checked without torch."""

from importlib.util import find_spec
from typing import NamedTuple

from configs.base import ConfigError

from .data import BUNDLED, PACKAGED
from .family import ModelSection, no_such
from .run import Config

Words = str | tuple[str, ...]
"""What a network takes or gives: one kind of inputs or outputs, or several."""


class Ends(NamedTuple):
    """What a family's network takes and gives, or what a task needs of one. They fit if they have a kind in common at
    either end."""

    takes: Words
    gives: Words

    def fits(self, other: "Ends") -> bool:
        return bool(in_both(self.takes, other.takes) and in_both(self.gives, other.gives))

    def __str__(self) -> str:
        return f"from {' or '.join(one_by_one(self.takes))} to {' or '.join(one_by_one(self.gives))}"


FAMILY_ENDS = {
    "decoder": Ends("tokens", "loss of tokens"),
    "convnet": Ends("images", ("classes", "embeddings")),
    "mlp": Ends(("rows", "images"), ("classes", "numbers", "embeddings")),
    "encoder": Ends(("tokens", "texts"), ("logits of tokens", "classes", "numbers")),
    "vit": Ends("images", ("classes", "embeddings")),
    "autoencoder": Ends(("rows", "images"), "reconstructions"),
    "diffusion": Ends("images", "noise in images"),
    "recurrent": Ends(("tokens", "texts"), ("loss of tokens", "classes", "numbers")),
    "transformers": Ends(
        ("tokens", "images", "texts", "pairs"),
        ("loss of tokens", "logits of tokens", "classes", "numbers", "next tokens"),
    ),
    "neural_ode": Ends(("rows", "images"), ("classes", "numbers")),
    "gnn": Ends(("graphs", "nodes"), ("classes", "numbers")),
    "encoder_decoder": Ends("pairs", "next tokens"),
    "mae": Ends("images", "patches"),
    "gan": Ends("images", "images and logits"),
    "latent_ode": Ends("series", "reconstructions of series"),
    "dual_encoder": Ends("captions", "pairs of embeddings"),
}
"""By family; `models.families.FAMILIES` adds those of plugins."""
TASK_ENDS = {
    "language_modelling": Ends("tokens", "loss of tokens"),
    "masked_language_modelling": Ends("tokens", "logits of tokens"),
    "reconstruction": Ends(("rows", "images"), "reconstructions"),
    "denoising": Ends("images", "noise in images"),
    "classification": Ends(("rows", "images", "graphs", "nodes", "texts"), "classes"),
    "regression": Ends(("rows", "graphs", "texts"), "numbers"),
    "sequence_to_sequence": Ends("pairs", "next tokens"),
    "contrastive": Ends("images", "embeddings"),
    "self_distillation": Ends("images", ("embeddings", "predictions")),
    "masked_reconstruction": Ends("images", "patches"),
    "adversarial": Ends("images", "images and logits"),
    "series_reconstruction": Ends("series", "reconstructions of series"),
    "image_text_contrastive": Ends("captions", "pairs of embeddings"),
}
"""By task; `models.tasks.table.TASKS` adds those of plugins."""


def one_by_one(words: Words) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else words


def in_both(some: Words, others: Words) -> list[str]:
    """The kinds that stand in both, in the order of the first."""
    return [word for word in one_by_one(some) if word in one_by_one(others)]


def ends_of(model: ModelSection) -> Ends:
    """What the network takes and gives: as all of the family do, unless its section says it."""
    return Ends(*model.ends) if model.ends else FAMILY_ENDS[model.family]


def check_pair(config: Config) -> None:
    """Raise ConfigError if the family's network does not fit the task, either is not known, or the family needs what is
    not installed."""
    name = config.model.family
    if name not in FAMILY_ENDS:  # first: the default task is the family's
        raise no_such("model.family", name, FAMILY_ENDS)
    if config.task not in TASK_ENDS:
        raise no_such("task", config.task, TASK_ENDS)
    if missing := [module for module in config.model.needs if find_spec(module) is None]:
        raise ConfigError(f"model.family={name} needs {' and '.join(missing)}: pip install 'muster-train[families]'")
    family, task = ends_of(config.model), TASK_ENDS[config.task]
    if task.fits(family):
        return
    fitting = [f"task={other}" for other, each in TASK_ENDS.items() if each.fits(family)]
    fitting += [f"model.family={other}" for other, each in FAMILY_ENDS.items() if task.fits(each) and other != name]
    raise ConfigError(
        f"task={config.task} needs a network {task}, but that of model.family={name} goes {family}: set "
        f"{' or '.join(fitting) or 'another task or family'}"
    )


def kind_of_data(config: Config) -> str:
    """What the examples are: `data.kind`, else the first that the family takes and the task learns from.

    Raises:
        ConfigError: as `check_pair`; or the data are of another kind.
    """
    check_pair(config)
    possible = in_both(ends_of(config.model).takes, TASK_ENDS[config.task].takes)
    kind = config.data.kind or possible[0]
    if kind not in possible:
        right = "leave data.kind out" if possible[0] == "tokens" else f"set data.kind={possible[0]}"
        raise ConfigError(
            f"data.kind={kind}: model.family={config.model.family} with task={config.task} learns from "
            f"{' or '.join(possible)}: {right}, or set another model.family"
        )
    check_packaged(config, kind)
    config.model.check_kind(kind)
    return kind


MIXED = {"mixup": ("rows", "images"), "cutmix": ("images",)}
"""The kinds of examples that can be mixed, by the key of `train` that asks for it."""


def check_mixing(config: Config) -> None:
    """Raise ConfigError if examples are to be mixed that cannot be."""
    for key, kinds in MIXED.items():
        if not getattr(config.train, key):
            continue
        if config.task != "classification" or (kind := kind_of_data(config)) not in kinds:
            what = f"task={config.task}" if config.task != "classification" else f"data.kind={kind}"
            raise ConfigError(
                f"train.{key} is for task=classification of {' or '.join(kinds)}, not {what}: leave it out"
            )
        if config.train.micro_batch == 1:
            raise ConfigError(f"train.micro_batch=1 leaves nothing to mix with by train.{key}: set it to 2 or more")


def check_packaged(config: Config, kind: str) -> None:
    """Raise ConfigError if examples of one kind are to come from packaged data of another."""
    path = config.data.path
    if not isinstance(path, str) or (found := PACKAGED.get(path)) == kind:
        return
    if found:
        what = "is text" if found == "tokens" else f"has {found}"
        own = f"a Parquet file of {kind}, or a folder of them" if kind != "tokens" else "stdlib, or a prepared folder"
        raise ConfigError(f"data.path={path} {what}, but task={config.task} learns from {kind}: set data.path to {own}")
    if path.startswith("bundled:"):
        raise no_such("data.path", path, BUNDLED)

"""The table of tasks. A plugin adds one with `TASKS["name"] = Mine`, a subclass of `models.tasks.task.Task`."""

from configs import Config
from configs.sections.family import no_such
from configs.sections.pairs import TASK_ENDS, Ends, check_pair

from .classification import Classification, Regression
from .images.adversarial import Adversarial
from .images.contrastive import Contrastive
from .images.denoising import Denoising
from .images.image_text import ImageTextContrastive
from .images.masked_reconstruction import MaskedReconstruction
from .images.reconstruction import Reconstruction
from .images.self_distillation import SelfDistillation
from .language_modelling import LanguageModelling
from .masked_language_modelling import MaskedLanguageModelling
from .sequence_to_sequence import SequenceToSequence
from .series_reconstruction import SeriesReconstruction
from .task import Task


class Tasks(dict[str, type[Task]]):
    """Registers with `configs` what it needs to know of a task when the task is added."""

    def __setitem__(self, name: str, task: type[Task]) -> None:
        TASK_ENDS[name] = Ends(task.takes, task.gives)
        super().__setitem__(name, task)


TASKS = Tasks()
TASKS["language_modelling"] = LanguageModelling
TASKS["classification"] = Classification
TASKS["regression"] = Regression
TASKS["masked_language_modelling"] = MaskedLanguageModelling
TASKS["reconstruction"] = Reconstruction
TASKS["denoising"] = Denoising
TASKS["sequence_to_sequence"] = SequenceToSequence
TASKS["contrastive"] = Contrastive
TASKS["self_distillation"] = SelfDistillation
TASKS["masked_reconstruction"] = MaskedReconstruction
TASKS["adversarial"] = Adversarial
TASKS["series_reconstruction"] = SeriesReconstruction
TASKS["image_text_contrastive"] = ImageTextContrastive


def task_of(config: Config) -> Task:
    """The run's task. Raises ConfigError as `task_class`."""
    return task_class(config)(config)


def task_class(config: Config) -> type[Task]:
    """The entry of `config.task`.

    Raises:
        ConfigError: no such task.
    """
    name = config.task
    if name not in TASKS:
        raise no_such("task", name, TASKS)
    return TASKS[name]


def reads(config: Config) -> str:
    """The kind of examples that the run learns from, an entry of `trainer.data.kinds.KINDS`. Raises ConfigError as
    `configs.sections.pairs.check_pair` and `kind_of_data`."""
    check_pair(config)
    return task_class(config).kind(config)

"""The table of tasks. A plugin adds one with `TASKS["name"] = Mine`, a subclass of `models.tasks.task.Task`."""

from configs import Config, ConfigError
from configs.sections.family import TASK_NAMES, no_such
from models.families import FAMILIES, Family, Words, family_of, in_both, one_by_one

from .classification import Classification, Regression
from .language_modelling import LanguageModelling
from .task import Task


class Tasks(dict[str, type[Task]]):
    """Registers the name of a task with `configs` when the task is added."""

    def __setitem__(self, name: str, task: type[Task]) -> None:
        TASK_NAMES.add(name)
        super().__setitem__(name, task)


TASKS = Tasks()
TASKS["language_modelling"] = LanguageModelling
TASKS["classification"] = Classification
TASKS["regression"] = Regression


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
    `check_pair`, and if `data.kind` is not one of those that the family takes."""
    check_pair(config)
    return task_class(config).kind(config)


def check_pair(config: Config) -> None:
    """Raise ConfigError if the family's network does not fit the task, or either is not known."""
    family = family_of(config.model)  # first: the default task is the family's
    task = task_class(config)
    if _fit(task, family):
        return
    fitting = [f"task={name}" for name, each in TASKS.items() if _fit(each, family)]
    fitting += [f"model.family={name}" for name, each in FAMILIES.items() if _fit(task, each)]
    raise ConfigError(
        f"task={config.task} needs a network from {_said(task.takes)} to {_said(task.gives)}, but that of model.family="
        f"{config.model.family} goes from {_said(family.takes)} to {_said(family.gives)}: set "
        f"{' or '.join(fitting) or 'another task or family'}"
    )


def _said(words: Words) -> str:
    return " or ".join(one_by_one(words))


def _fit(task: type[Task], family: Family) -> bool:
    return bool(in_both(task.takes, family.takes) and in_both(task.gives, family.gives))

"""The table of tasks. A plugin adds one with `TASKS["name"] = Mine`, a subclass of `models.tasks.task.Task`."""

from configs import Config, ConfigError
from configs.sections.family import TASK_NAMES, no_such
from models.families import FAMILIES, family_of

from .language_modelling import LanguageModelling
from .task import Task


class Tasks(dict[str, type[Task]]):
    """Registers the name of a task with `configs` when the task is added."""

    def __setitem__(self, name: str, task: type[Task]) -> None:
        TASK_NAMES.add(name)
        super().__setitem__(name, task)


TASKS = Tasks()
TASKS["language_modelling"] = LanguageModelling


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


def check_pair(config: Config) -> None:
    """Raise ConfigError if the family's network does not fit the task, or either is not known."""
    family = family_of(config.model)  # first: the default task is the family's
    task = task_class(config)
    if (task.takes, task.gives) == (family.takes, family.gives):
        return
    wanted, there = (task.takes, task.gives), (family.takes, family.gives)
    fitting = [f"task={name}" for name, each in TASKS.items() if (each.takes, each.gives) == there]
    fitting += [f"model.family={name}" for name, each in FAMILIES.items() if (each.takes, each.gives) == wanted]
    raise ConfigError(
        f"task={config.task} needs a network from {task.takes} to {task.gives}, but that of model.family="
        f"{config.model.family} goes from {family.takes} to {family.gives}: set "
        f"{' or '.join(fitting) or 'another task or family'}"
    )

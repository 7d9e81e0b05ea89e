"""Do something in a training process when it begins a step."""

from collections.abc import Callable

from trainer.trainee import Trainee


def before_each_step(do: Callable[[int], None]) -> None:
    """Call `do` with the number of each step as this process begins it, before the step's learning rate is set."""
    original = Trainee.set_learning_rate

    def wrapped(self: Trainee, step: int, *drops: int) -> float:
        do(step)
        return original(self, step, *drops)

    Trainee.set_learning_rate = wrapped  # type: ignore[method-assign]

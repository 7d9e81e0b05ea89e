"""Checks of a model and its task before any device is held: the model is built on the meta device."""

from collections import Counter

from torch import nn

from configs import Config, ConfigError, counted
from configs.sections.optim import OPTIMIZERS
from configs.sections.pairs import check_pair
from models.families import build
from models.norm_memory import batch_norms
from models.tasks.table import task_of
from trainer.engine.precision import check_precision
from trainer.schedule import optimizer_of


def check_model(config: Config) -> None:
    """Build the network and check the config against it. The caller sets torch's default device to meta.

    Args:
        config: resolved.

    Raises:
        ConfigError: task and family do not match, a phase trains a submodule that the model does not have, or the
            network cannot be trained as configured.
    """
    check_pair(config)
    module, train, family = build(config.model), config.train, config.model.family
    check_precision(module, config)
    if check := getattr(module, "check", None):
        check(config)
    if train.recompute_every and not hasattr(module, "set_activation_checkpointing"):
        raise ConfigError(
            f"train.activation_checkpointing={train.activation_checkpointing}: model.family={family} does not support "
            "it (its module has no set_activation_checkpointing): set it to none"
        )
    if train.micro_batch and train.global_batch % train.micro_batch and any(True for _ in batch_norms(module)):
        raise ConfigError(
            f"train.micro_batch ({train.micro_batch}) does not divide train.global_batch ({train.global_batch}), and "
            f"BatchNorm would see the padding: set train.micro_batch to a divisor"
        )
    _check_phases(module, config)


def _check_phases(module: nn.Module, config: Config) -> None:
    phases = task_of(config).phases
    names = Counter(phase.name for phase in phases)
    if not phases or max(names.values()) > 1 or phases[0].every != 1:
        raise ConfigError(f"task={config.task}: each phase needs a name of its own, and the first must have every=1")
    trained: dict[int, str] = {}
    for phase in phases:
        try:
            part = module.get_submodule(phase.parameters)
        except AttributeError:
            raise ConfigError(
                f"task={config.task} trains {phase.parameters}, which model.family={config.model.family} does not have"
            ) from None
        if not any(parameter.requires_grad for parameter in part.parameters()):
            raise ConfigError(f"task={config.task}: there is nothing to train in {phase.parameters or 'the model'}")
        for parameter in part.parameters():
            if (other := trained.setdefault(id(parameter), phase.name)) != phase.name:
                raise ConfigError(
                    f"task={config.task}: its phases {other} and {phase.name} share parameters: a parameter may belong "
                    "to one phase only"
                )
        optimizer = optimizer_of(config, phase)
        if OPTIMIZERS[optimizer.name].whole_matrices and config.parallel.zero_stage:
            raise ConfigError(
                f"task={config.task} trains {phase.name} with {optimizer.name}, which needs whole matrices: set "
                "parallel.zero_stage=0"
            )
    if left := [name for name, parameter in module.named_parameters() if id(parameter) not in trained]:
        raise ConfigError(
            f"task={config.task}: no phase contains {left[0]} ({counted(len(left), 'parameter')} of model.family="
            f"{config.model.family} in all), so no checkpoint would either: add it to a phase, with "
            "requires_grad=False if it should not be trained"
        )
    if len(phases) > 1 and config.parallel.zero_stage == 3:
        raise ConfigError(
            f"parallel.zero_stage=3: task={config.task} has {len(phases)} phases, each with an engine of its own, and "
            "ZeRO-3 gathers weights for the passes of its own engine only: set it to 0, 1 or 2"
        )
    if len(phases) > 1 and config.train.precision == "fp16":
        raise ConfigError(
            f"train.precision=fp16: not supported with the {len(phases)} phases of task={config.task}: set it to bf16 "
            "or fp32"
        )

"""Turn the config as written into the config that will be used, in one place, with a note on all that was derived or
changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base import ConfigError
from .load import flatten
from .sections.model import ModelConfig
from .sections.optim import OPTIMIZERS
from .sections.pairs import check_mixing, kind_of_data
from .sections.run import Config
from .sections.train import TrainConfig
from .topology import check_topology, refusals
from .units import counted

OF_TOKENS = ("tokens", "pairs", "texts")
"""Kinds of data that are sequences of at most train.seq_len tokens."""


def resolve(config: Config, *, vocab_size: int | None = None) -> tuple[Config, list[str]]:
    """Fill in every derived value and check what depends on several sections.

    Args:
        config: as the user wrote it.
        vocab_size: the tokenizer's size if the data are available; otherwise model.vocab_size must be given.

    Returns:
        The config with every derived value filled in, and one line for each value that was derived or adjusted.

    Raises:
        ConfigError: sections that contradict each other.
    """
    values = flatten(config) if config.defaults else {}
    derived = ("train.micro_batch", "parallel.dp")  # handled below, with notes of their own
    notes = [f"{key}={values[key]}: {why}" for key, why in config.defaults.items() if why and key not in derived]
    model, train, parallel, cluster = config.model, config.train, config.parallel, config.cluster
    if not config.plugins:  # which may bring a family or a task: `trainer.run.plugins` checks what it has loaded
        kind = kind_of_data(config)
        if kind not in OF_TOKENS and train.seq_len != TrainConfig().seq_len:
            notes.append(f"train.seq_len={train.seq_len}: has no effect, since task={config.task} learns from {kind}")

    def derive(section: str, key: str, value: object, why: str) -> object:
        notes.append(f"{section}.{key}={value}: {why}")
        return value

    changes = {key: derive("model", key, *found) for key, found in model.derived.items()}
    if "vocab_size" in type(model).model_fields:
        changes |= _vocabulary(config, vocab_size, derive)
    if isinstance(model, ModelConfig):
        changes |= _of_decoder(config, derive)
    if "max_positions" in type(model).model_fields:
        changes |= _positions(config, derive)
    model = model.model_copy(update=changes)

    if cluster.workers and cluster.workers[1] != parallel.world_size:
        most, others = cluster.workers[1], parallel.world_size // parallel.dp
        if most % others or parallel.dp > 1:
            raise ConfigError(
                f"cluster.workers={list(cluster.workers)} allows at most {most} processes, but parallel.dp * tp * "
                f"pp * sp is {parallel.world_size}: leave parallel.dp out, and choose tp * pp * sp so that it "
                f"divides {most}"
            )
        why = "the maximum of cluster.workers / (tp * pp * sp)"
        parallel = parallel.model_copy(update={"dp": derive("parallel", "dp", most // others, why)})

    data_parallel = parallel.dp
    if train.micro_batch is None:
        if train.global_batch < data_parallel:
            raise ConfigError(
                f"train.global_batch ({train.global_batch}) is too small for {data_parallel} data-parallel ranks: "
                f"raise it to {data_parallel} or lower parallel.dp"
            )
        if parallel.pp_schedule == "dualpipev":
            size, why = max(1, train.global_batch // (data_parallel * parallel.stages)), "global_batch / (dp * 2 * pp)"
        else:
            size, why = -(-train.global_batch // data_parallel), "global_batch / dp"
        micro = derive("train", "micro_batch", size, why)
        train = train.model_copy(update={"micro_batch": micro})

    split = [f"{name}={getattr(parallel, name)}" for name in ("tp", "pp", "ep") if getattr(parallel, name) > 1]
    if split and parallel.zero_stage == 0:
        why = f"DeepSpeed's gradient norm is wrong at stage 0 with {' '.join(split)}"
        parallel = parallel.model_copy(update={"zero_stage": derive("parallel", "zero_stage", 1, why)})
    check_topology(config.model_copy(update={"model": model, "train": train, "parallel": parallel}))
    # ZeRO flattens parameters into one vector per group, so an optimizer that needs their shapes would silently become
    # another one (Adafactor) or raise (Muon). For fp16 at stage 0 DeepSpeed accumulates gradients in fp16.
    if OPTIMIZERS[config.optim.name].whole_matrices and (parallel.zero_stage or train.precision == "fp16"):
        raise ConfigError(
            f"optim.name={config.optim.name} needs whole matrices, which ZeRO 1 to 3 flatten and partition, but "
            f"train.precision={train.precision} with parallel.zero_stage={parallel.zero_stage} needs ZeRO: set "
            "parallel.zero_stage=0 and train.precision=bf16 or fp32, or optim.name=adamw"
        )
    if train.precision == "fp16" and parallel.zero_stage == 0:
        stage = derive("parallel", "zero_stage", 1, "fp16 accumulates gradients in fp32 from stage 1 on")
        parallel = parallel.model_copy(update={"zero_stage": stage})
    if config.optim.sam and train.precision in ("fp16", "fp8"):
        raise ConfigError(
            f"optim.sam needs gradients that are not scaled, but train.precision={train.precision} scales them: set it "
            "to bf16 or fp32, or optim.sam=0"
        )
    if config.checkpoint.every == "auto":
        notes.append("checkpoint.every=auto: chosen during the run from the cost of a checkpoint and the failure rate")
    if config.optim.schedule == "exponential" and not config.optim.min_lr_ratio:
        raise ConfigError("optim.schedule=exponential never reaches 0: set optim.min_lr_ratio above 0")
    for key, asked in (
        ("train.early_stop.patience", train.early_stop.patience),
        ("optim.schedule=plateau", config.optim.schedule == "plateau"),
    ):
        if asked and not train.eval_every:
            raise ConfigError(
                f"{key} needs evaluations during the run: set train.eval_every={max(train.steps // 20, 1)}"
            )
    if (first := config.optim.swa_from) and (config.optim.ema_decay or first > train.steps):
        why = (
            f"is past the last step, {train.steps}" if first > train.steps else "and optim.ema_decay exclude each other"
        )
        raise ConfigError(
            f"optim.swa_from={first} {why}: set one of them to null, or optim.swa_from={train.steps // 2}"
        )
    warmup, decay = config.optim.warmup, config.optim.decay_steps
    if warmup > train.steps:
        raise ConfigError(
            f"optim.warmup ({warmup}) is longer than train.steps ({train.steps}): "
            f"set optim.warmup={train.steps // 10}, or train.steps={10 * warmup}"
        )
    if config.optim.schedule == "wsd" and decay and warmup + decay > train.steps:
        # A preset's warmup follows train.steps, unless it is given.
        kept = f" with optim.warmup={warmup}" if "optim.warmup" in config.defaults else ""
        raise ConfigError(
            f"optim.warmup ({warmup}) and optim.decay_steps ({decay}) add up to more than train.steps "
            f"({train.steps}): set optim.decay_steps={max((train.steps - warmup) // 5, 1)}, or "
            f"train.steps={warmup + decay}{kept}"
        )
    if train.profile.start and (last := train.profile.start + train.profile.steps - 1) > train.steps:
        raise ConfigError(
            f"train.profile covers steps {train.profile.start} to {last}, but the run ends at step {train.steps}: "
            f"lower train.profile.start or train.profile.steps, or set train.steps={last}"
        )
    resolved = config.model_copy(update={"model": model, "train": train, "parallel": parallel})
    check_mixing(resolved)
    return resolved.with_defaults({}), notes


def _vocabulary(config: Config, vocab_size: int | None, derive: Callable[..., object]) -> dict[str, object]:
    """Fill in vocab_size of any family that has one. Raises ConfigError."""
    model: Any = config.model
    changes: dict[str, object] = {}
    if model.vocab_size is None:
        if vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set, and there are no prepared data to take it from: set model.vocab_size"
            )
        rounded = -(-vocab_size // 64) * 64
        changes["vocab_size"] = derive(
            "model", "vocab_size", rounded, f"the tokenizer's {vocab_size}, rounded up to a multiple of 64"
        )
    elif vocab_size is not None and vocab_size > model.vocab_size and "model.vocab_size" in config.defaults:
        why = f"the preset's {model.vocab_size} is smaller than the tokenizer's {vocab_size}"
        changes["vocab_size"] = derive("model", "vocab_size", -(-vocab_size // 64) * 64, why)
    elif vocab_size is not None and vocab_size > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size} but the tokenizer of data.path has {vocab_size} tokens: "
            f"set model.vocab_size={-(-vocab_size // 64) * 64}"
        )
    return changes


def _positions(config: Config, derive: Callable[..., object]) -> dict[str, object]:
    """Fill in max_positions of any family that has it. Raises ConfigError."""
    model: Any = config.model
    length, longest = config.train.seq_len, model.max_positions
    if longest is None:
        return {"max_positions": derive("model", "max_positions", length, "train.seq_len")}
    if longest < length:
        raise ConfigError(
            f"train.seq_len ({length}) is longer than model.max_positions ({longest}): "
            f"set train.seq_len={longest}, or model.max_positions={length}"
        )
    return {}


def _of_decoder(config: Config, derive: Callable[..., object]) -> dict[str, object]:
    """Fill in the decoder's keys that follow from others. Raises ConfigError."""
    model, changes = config.model, dict[str, object]()
    if model.num_kv_heads is None:
        changes["num_kv_heads"] = derive("model", "num_kv_heads", model.num_heads, "model.num_heads")
    if model.head_dim is None:
        changes["head_dim"] = derive("model", "head_dim", model.hidden_size // model.num_heads, "hidden_size/num_heads")
    intermediate = model.intermediate_size
    if intermediate is None:
        intermediate = -(-8 * model.hidden_size // 3 // 64) * 64
        changes["intermediate_size"] = derive("model", "intermediate_size", intermediate, "8/3 hidden_size")
    if model.expert_size is None:
        changes["expert_size"] = derive("model", "expert_size", intermediate, "model.intermediate_size")
    return changes


def with_workers(config: Config, workers: int) -> Config:
    """A resolved config changed to this number of processes, by its data parallelism.

    Raises:
        ConfigError: cluster.workers does not allow it, or the other degrees do not divide it.
    """
    if workers == config.parallel.world_size:
        return config
    others = config.parallel.world_size // config.parallel.dp
    fewest, most = config.cluster.workers or (config.parallel.world_size,) * 2
    if workers % others or not fewest <= workers <= most:
        raise ConfigError(
            f"{counted(workers, 'process', 'was/were')} started but parallel.dp * tp * pp * sp is "
            f"{config.parallel.world_size}: start as many, change the degrees, or allow it with "
            "cluster.workers=[min, max]"
        )
    changes = {
        "parallel": config.parallel.model_copy(update={"dp": workers // others}),
        "cluster": config.cluster.model_copy(update={"workers": None}),
    }
    changed, _ = resolve(config.model_copy(update=changes), vocab_size=getattr(config.model, "vocab_size", None))
    return changed.model_copy(update={"cluster": config.cluster})


def worker_counts(config: Config) -> list[int]:
    """The numbers of processes that a resolved config can be trained with, largest first."""
    parallel, world = config.parallel, config.parallel.world_size
    others = world // parallel.dp

    def can_run(workers: int) -> bool:
        if workers % others:
            return False
        return not refusals(
            config.model_copy(update={"parallel": parallel.model_copy(update={"dp": workers // others})})
        )

    fewest = (config.cluster.workers or (world,))[0]
    return [world, *(workers for workers in range(world - 1, fewest - 1, -1) if can_run(workers))]


MAY_CHANGE = (
    "parallel.", "cluster.", "tracking.", "checkpoint.", "train.micro_batch", "train.steps", "run.root",
    # The same result, computed differently:
    "train.activation_checkpointing", "train.checkpoint_every_layers",
    # Monitoring only, or beside the weights that are trained:
    "train.profile.", "train.eval_every", "train.log_every", "train.sample_", "data.prefetch", "data.limits.",
    "optim.ema_decay", "optim.ema_schedule", "optim.swa_from",
    # When it ends:
    "train.early_stop.",
)  # fmt: skip
"""Keys that may change between attempts of a run; a change of any other key makes it another run."""


def differences(before: Config, after: Config) -> tuple[dict, dict]:
    """Compare two resolved configs of one run.

    Returns:
        `(allowed, refused)`, each `{key: (before, after)}`: changes that are recorded as an event, and changes
        that would make it another run.
    """
    old, new = flatten(before), flatten(after)
    changed = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
    allowed = {
        key: pair
        for key, pair in changed.items()
        if key.startswith(MAY_CHANGE) or (key in ("plugins", "train.init_from") and _moved(*pair))
    }
    return allowed, {key: pair for key, pair in changed.items() if key not in allowed}


def _moved(before: Any, now: Any) -> bool:
    """Whether paths are unchanged relative to the working directory: each job of a cluster has its own copy of that."""
    old, new = ([value] if isinstance(value, str) else list(value or ()) for value in (before, now))
    here = Path.cwd()

    def same(one: str, other: str) -> bool:
        inside = Path(other).relative_to(here).parts if Path(other).is_relative_to(here) else ()
        return one == other or (bool(inside) and Path(one).parts[-len(inside) :] == inside)

    return len(old) == len(new) and all(map(same, old, new))

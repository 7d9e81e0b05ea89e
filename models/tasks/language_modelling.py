"""Language modelling: the next token's cross-entropy, the routers' balancing losses, and the routers' memory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from configs import Config, ConfigError, ModelConfig
from configs.sections.pairs import TASK_ENDS
from models.batch import Batch
from models.loss import IGNORE
from models.moe.balance import RouterTap
from models.moe.collapse import after_step as count_starved
from models.moe.router import Chooser, choosers

from .samples import Text
from .task import Change, Memory, Modules, Nets, Sums, Task, Value

BIAS, LOAD = "router.bias", "router.load"
"""Keys of memory: balancing biases, and each expert's share of the last step's assignments; [MoE layers, experts]."""


class LanguageModelling(Task):
    """Predicts each token from those before it."""

    takes, gives = TASK_ENDS["language_modelling"]
    example = "sequences"

    def __init__(self, config: Config):
        super().__init__(config)
        self.tap: RouterTap | None = None
        """Reads the routers; None for dense models, and in a pipeline, whose stages have their own."""
        self.choosers: list[Chooser] = []
        """Of the MoE layers that this process holds."""

    @property
    def counts(self) -> tuple[int, str]:
        return self.config.train.seq_len, "tokens"

    @property
    def extra(self) -> dict[str, tuple[int, ...]]:
        """Router statistics, averaged over micro-batches: the unweighted losses, and for each layer the experts' loads,
        then entropy, confidence and the share of dropped assignments (`models.moe.balance.Heard`)."""
        return router_extra(self.config.model)

    def attach(self, modules: Modules, mean_over_parts: Callable[[Tensor], Tensor] | None = None) -> None:
        self.choosers = list(choosers(modules[""]))
        if self.config.model.is_moe and self.config.parallel.pp == 1:
            self.tap = RouterTap(modules[""], self.config.model, mean_over_parts)

    def loss(self, nets: Nets, batch: Batch, phase: str) -> Sums:
        loss_sum, tokens, *penalty = nets[phase](batch)  # experts that are not ours may come with a loss of their own
        router = self.tap.collect() if self.tap else None
        if router is None:
            return Sums(loss_sum, tokens, penalty=penalty[0] if penalty else None)
        model, parallel, train = self.config.model, self.config.parallel, self.config.train
        assert train.micro_batch
        of_a_rank = math.ceil(math.ceil(train.global_batch / train.micro_batch) / parallel.dp)
        micro_batches = of_a_rank * parallel.dp * parallel.sp
        found = {"aux_loss": router.aux_loss, "z_loss": router.z_loss, "router": router.by_layer()}
        extra = {name: value.detach().double() / micro_batches for name, value in found.items()}
        penalty = model.aux_loss_weight * router.aux_loss + model.z_loss_weight * router.z_loss
        return Sums(loss_sum, tokens, extra, penalty)

    def evaluate(self, nets: Nets, batch: Batch) -> Sums:
        loss_sum, tokens = nets["model"](batch)
        return Sums(loss_sum, tokens)

    @property
    def draws(self) -> bool:
        """Not in a pipeline, where no process has the whole model; `muster generate` samples from its checkpoints."""
        return self.config.train.sample_tokens > 0 and self.config.parallel.pp == 1

    def samples(self, nets: Modules, batch: Any) -> Text:
        """Each of train.sample_prompts with the model's continuation; `batch`: see `trainer.data.tokenizer.prompts`."""
        train = self.config.train
        how = {"max_new_tokens": train.sample_tokens, "temperature": train.sample_temperature}
        try:
            texts = batch.continued(nets["model"], seed=self.config.run.seed, **how)
        except ConfigError as error:  # logits that are not finite, which must not end a run
            texts = [str(error)]
        return Text(("\n" + "-" * 80 + "\n").join(texts) + "\n")

    @property
    def routed(self) -> list[int] | None:
        return [chooser.layer for chooser in self.choosers] if self.config.model.is_moe else None

    def choices(self) -> list[Tensor]:
        return self.tap.choices() if self.tap else []

    def routed_tokens(self, batch: Batch) -> Tensor:
        """Those that have a label."""
        return batch.input_ids.where(batch.labels != IGNORE, IGNORE).flatten()

    def metrics(self, extra: Mapping[str, Value], weight: float) -> dict[str, Value]:
        if not extra:
            return {}
        load, (entropy, confidence, dropped) = by_layer(extra["router"])
        found = {"aux_loss": extra["aux_loss"], "z_loss": extra["z_loss"], "expert_load": load}
        found |= {
            "expert_maxvio": [max(layer) * len(layer) - 1 for layer in load],
            "expert_dead": [sum(share == 0 for share in layer) for layer in load],
            "router_entropy": entropy,
            "router_confidence": confidence,
        }
        return found | {"dropped": dropped} if self.config.model.capacity_factor else found

    def watch(self, counts: list[list[int]], extra: Mapping[str, Value]) -> tuple[list[list[int]], list[Change]]:
        return count_starved(counts, by_layer(extra["router"])[0] if extra else [])

    @property
    def counted(self) -> tuple[int, int]:
        model = self.config.model
        return (model.num_moe_layers, model.num_experts) if model.is_moe else (0, 0)

    def fresh_memory(self, modules: Modules) -> dict[str, list]:
        return fresh_routers(self.config.model)

    def known_memory(self, modules: Modules) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys((BIAS, LOAD), self.counted)

    def after_step(self, memory: Memory, extra: Mapping[str, Tensor], micro_batches: int) -> Memory:
        return routers_after_step(memory, extra["router"][:, :-3], micro_batches, self.config) if memory else memory

    def tell(self, modules: Modules, memory: Memory) -> None:
        if self.config.model.is_moe:
            tell_routers(self.choosers or choosers(modules[""]), memory, self.config.model)


def router_extra(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """See `LanguageModelling.extra`."""
    if not model.is_moe:
        return {}
    return {"aux_loss": (), "z_loss": (), "router": (model.num_moe_layers, model.num_experts + 3)}


def by_layer(router: Sequence[Sequence[float]]) -> tuple[list[list[float]], tuple[list[float], ...]]:
    """(loads [MoE layers][experts], (entropy, confidence, dropped), each [MoE layers])."""
    return [list(row[:-3]) for row in router], tuple([row[i] for row in router] for i in (-3, -2, -1))


def fresh_routers(model: ModelConfig) -> dict[str, list]:
    """The routers' memory before the first step: no bias, and even loads."""
    found: dict[str, list] = {}
    if not model.is_moe:
        return found
    layers, experts = model.num_moe_layers, model.num_experts
    if model.router_bias_rate is not None:
        found[BIAS] = [[0.0] * experts for _ in range(layers)]
    if model.aux_loss_over == "global_batch":
        found[LOAD] = [[1 / experts] * experts for _ in range(layers)]
    return found


def routers_after_step(memory: Memory, load: Tensor, micro_batches: int, config: Config) -> Memory:
    """The routers' memory after a step. All of it stays on the device.

    A bias moves by `model.router_bias_rate` towards an even load (arXiv:2412.19437, section 2.1.2): b_e += rate *
    sign(mean load - load_e). Loads are compared as integer numbers of assignments, so that rounding cannot flip the
    sign.

    Args:
        load: float64 [MoE layers, experts], each expert's share of the assignments over the whole global batch.
        micro_batches: of the global batch, including those of padding.
    """
    model, train = config.model, config.train
    found = dict(memory)
    if LOAD in memory:
        found[LOAD] = load
    if BIAS in memory and model.router_bias_rate:
        assert train.micro_batch
        assignments = micro_batches * train.micro_batch * train.seq_len * model.top_k
        short = assignments - (load * assignments).round() * load.shape[1]
        found[BIAS] = memory[BIAS] + model.router_bias_rate * short.sign()
    return found


def tell_routers(found: Iterable[Chooser], memory: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Give each chooser its rows of memory; the choosers may be only some of the model's."""
    order = [i for i in range(model.num_layers) if model.is_moe_layer(i)]
    rows = {key: value.float() for key, value in memory.items()}
    for chooser in found:
        row = order.index(chooser.layer)
        if BIAS in rows:
            chooser.bias = rows[BIAS][row]
        if LOAD in rows:
            chooser.global_load = rows[LOAD][row]

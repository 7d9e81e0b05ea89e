"""One network with its optimizer, split across the processes of a run: what the trainer sees of DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from configs import Config
from configs.sections.optim import OptimConfig
from trainer.checkpoint.fragments import whole

from . import private
from .ema import Ema, Lookahead
from .guard import Guarded, guard
from .optim import GradientNoise, Sam, build_optimizer, clip_by_value, parameter_groups, penalise_magnitudes
from .parallel import box_of, expert_group_name, keep_routers, plain_name
from .precision import WorkingCopies
from .settings import engine_config
from .slots import Piece, Slot


class Engine:
    """One network with its optimizer, split across the processes as the config says.

    A process may hold several: one for each network that has an optimizer of its own.

    Attributes:
        module: the network; DeepSpeed may have replaced some of its layers.
        optimizer: torch's own, over this process's share of the fp32 weights.
        prefix: prefix of its parameters' names in a checkpoint.
        device: where the network is.
        accumulation: micro-batches per step in this process.
        sharded: whether a process holds only its own part of each working weight (ZeRO-3).
        replicated: whether every process holds all optimizer states in full (ZeRO-0).
        ema: moving average of the trained weights; None if neither `ema_decay` nor `swa_from` is set.
        lookahead: their slow weights; None without `lookahead_every`.
        sam: climbs before a step; None without `sam`.
        deepspeed: DeepSpeed's own engine, used only within this folder.
    """

    def __init__(self, module: nn.Module, config: Config, optim: OptimConfig | None = None, prefix: str = "") -> None:
        """The process group must exist, and all processes must create their engines in the same order.

        Args:
            module: a plain network with its initial weights; this engine's optimizer updates its parameters.
            config: the run's resolved config.
            optim: config of this network's own optimizer, if it is not config.optim.
            prefix: prefix of its parameters' names in a checkpoint, if the run has other networks.
        """
        optim, parallel = optim or config.optim, config.parallel
        experts = expert_group_name(config) if parallel.ep > 1 else None
        optimizer = build_optimizer(parameter_groups(module, optim, experts), optim)
        self.prefix = prefix
        self._shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self._fp16 = config.train.precision == "fp16"
        self._copies = None
        if parallel.zero_stage == 0:
            self._copies = WorkingCopies(module, torch.bfloat16) if config.train.kept_in == "bf16" else None
            guard(optimizer, config.train.grad_clip, self._copies)
        given, settings = self._for_deepspeed(module, config)
        self.deepspeed = private.initialize(given, optimizer, settings)
        self.module: nn.Module = self.deepspeed.module
        self.device: torch.device = self.deepspeed.device
        self.optimizer = private.base_optimizer(self.deepspeed)
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self.sharded, self.replicated = parallel.zero_stage == 3, self.optimizer is self.deepspeed.optimizer
        if self._copies:
            self._copies.refresh()  # DeepSpeed has broadcast rank 0's parameters
        self._tp_rank = private.tensor_parallel_rank() if parallel.tp > 1 else 0
        self._ep_rank = private.expert_parallel_rank(self.module)
        keep_routers(self.module)
        if parallel.tp > 1:
            private.compare_no_inputs(self.deepspeed)
        if parallel.tp > 1 and parallel.ep > 1:
            # The pieces that processes write to a checkpoint hold each element exactly once.
            private.count_once(self.deepspeed, {id(piece.parameter) for piece in self.pieces() if piece.writes})
        if parallel.zero_stage == 0 and torch.distributed.get_world_size() == 1:
            private.reduce_no_gradients(self.deepspeed)
        trained = {id(slot.owner): slot.owner for slot in self.slots() if slot.parameter.requires_grad}.values()
        self.lookahead = self.ema = self.sam = self._noise = None
        if optim.lookahead_every:  # before the average, which is of what goes on
            self.lookahead = Lookahead(self.optimizer, trained, optim.lookahead_every, optim.lookahead_share)
        if optim.averages:
            rising = config.train.steps if optim.ema_schedule == "cosine" else None
            self.ema = Ema(self.optimizer, trained, optim.ema_decay, optim.swa_from, rising)
        if config.train.clip_value:
            clip_by_value(self.optimizer, config.train.clip_value)
        if optim.l1:
            penalise_magnitudes(self.optimizer)
        if optim.gradient_noise:
            slots = [slot for slot in self.slots() if slot.parameter.requires_grad]
            self._noise = GradientNoise(self.optimizer, slots, optim.gradient_noise, config.run.seed)
        if optim.sam:
            masters = {id(each) for each in self._copies.masters} if self._copies else set()
            leaves = [p for p in self.parameters() if p.requires_grad and id(p) not in masters]
            self.sam = Sam(leaves, optim.sam)

    def _for_deepspeed(self, module: nn.Module, config: Config) -> tuple[nn.Module, dict[str, Any]]:
        """The module and the config to give to DeepSpeed."""
        return module, engine_config(config)

    def __call__(self, *inputs: Any) -> Any:
        """The network's forward pass over a micro-batch, called like the module itself."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate a micro-batch's gradients; DeepSpeed divides by `accumulation`, and averages over processes."""
        self.deepspeed.backward(loss)

    def step(self) -> None:
        """Call after each micro-batch; the last one of a step updates the weights."""
        self.deepspeed.step()

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def parameters(self) -> Iterator[Tensor]:
        """All tensors that can receive gradients: the network's parameters, and the working copies of them if any."""
        yield from self.module.parameters()
        yield from self._copies.copies if self._copies else ()

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def set_step(self, step: int) -> None:
        """Say the number of the next optimizer step, from 1."""
        for each in (self.ema, self.lookahead, self._noise):
            if each:
                each.step = step

    def set_every(self, every: int) -> None:
        """See `Follower.every`."""
        for each in (self.ema, self.lookahead):
            if each:
                each.every = every

    def norm_and_skipped(self) -> Tensor:
        """[gradient norm before clipping, 1 if skipped else 0] of the step just launched: float64 [2], on the device.

        With ZeRO, DeepSpeed's own step has already waited for the device, to check for an overflow.
        """
        if isinstance(self.optimizer, Guarded):
            values: tuple[Any, Any] = self.optimizer.norm, self.optimizer.not_finite
        else:
            values = self.deepspeed.get_global_grad_norm(), not self.deepspeed.was_step_applied()
        both = torch.empty(2, dtype=torch.float64, device=self.device)
        for place, value in zip(both, values, strict=True):
            place.copy_(value) if torch.is_tensor(value) else place.fill_(value or 0.0)
        return both

    def loss_scale(self) -> dict[str, Any] | None:
        """State of fp16's dynamic loss scaler as plain numbers; None in other precisions."""
        return private.loss_scale_state(private.scaler_of(self.deepspeed)) if self._fp16 else None

    def restore_loss_scale(self, state: dict[str, Any] | None) -> None:
        """Restore the loss scale and its counters; the scaler's settings come from the config."""
        if state is not None and self._fp16:
            private.restore_loss_scale(private.scaler_of(self.deepspeed), state)

    def parameters_changed(self) -> None:
        """Call after anything but the optimizer has written to the parameters."""
        if self._copies:
            self._copies.refresh()
        private.weights_changed(self.deepspeed)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the network computes with the average of its weights, if it keeps one. A collective. An
        exception is expected to end the attempt: it leaves the averages in place of the weights."""
        if not self.ema:
            yield
            return
        self._exchange(self.ema)
        yield
        self._exchange(self.ema)

    @torch.no_grad()
    def _exchange(self, ema: Ema) -> None:
        ema.exchange()
        for slot in self.slots():
            if slot.working is not None:
                slot.working.copy_(slot.view(slot.owner))
        private.use_masters(self.deepspeed)
        self.parameters_changed()

    def pieces(self) -> Iterator[Piece]:
        """Every parameter of this process, frozen ones too, in the module's order."""
        for name, parameter in self.module.named_parameters():
            plain, part = plain_name(name)
            if plain not in self._shapes and not parameter.requires_grad:
                continue  # DeepSpeed's own
            shape = self._shapes[plain]
            box = box_of(shape, private.local_shape(parameter), part, self._tp_rank, self._ep_rank)
            writes = self._tp_rank == 0 or box != whole(shape)
            yield Piece(self.prefix + plain, shape, box, parameter, writes)

    def slots(self) -> Iterator[Slot]:
        """Every stretch of these parameters whose states this process holds, in the same order."""
        for piece in self.pieces():
            if held := private.stretch(self.deepspeed, piece.parameter):
                yield Slot(**vars(piece), **vars(held))

    def destroy(self) -> None:
        """Remove what DeepSpeed has attached to the module and the process; the engine cannot be used afterwards."""
        self.deepspeed.destroy()

"""Train a tiny model on fixed random batches: with the engine, in any number of processes, or by a bare loop."""

from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs import Config
from models.batch import Batch
from models.families import build
from models.moe.balance import RouterTap
from trainer.checkpoint.fragments import parse_key, runs, within
from trainer.checkpoint.fragments import whole as full_box
from trainer.checkpoint.manifest import EMA, MASTER
from trainer.checkpoint.save import restore, take_snapshot
from trainer.checkpoint.store import Reader
from trainer.engine.engine import Engine
from trainer.engine.optim import build_optimizer, parameter_groups
from trainer.schedule import learning_rate
from trainer.step import micro_batches, outcome
from trainer.trainee import build_trainee


def batch_of(config: Config, indices: list[int]) -> Batch:
    """Random tokens, a pure function of each sequence's index; most labels of every fifth sequence are masked."""
    length, rows, labels = config.train.seq_len, [], []
    for index in indices:
        tokens = torch.randint(0, 256, (length + 1,), generator=torch.Generator().manual_seed(max(index, 0)))
        rows.append(tokens[:-1])
        target = tokens[1:].clone()
        if index < 0:
            target[:] = -100
        elif index % 5 == 0:
            target[: length * 3 // 4] = -100
        labels.append(target)
    positions = torch.arange(length).expand(len(indices), length)
    return Batch(torch.stack(rows), torch.stack(labels), positions, None, torch.tensor(indices))


def tokens_of(config: Config, step: int) -> int:
    first = (step - 1) * config.train.global_batch
    batch = batch_of(config, list(range(first, first + config.train.global_batch)))
    return int((batch.labels != -100).sum())


def tokens_on_device(config: Config, step: int) -> torch.Tensor:
    return torch.tensor(tokens_of(config, step), dtype=torch.float64)


HELD_OUT = range(10_000, 10_004)


class HeldOut:
    """A held-out split of four sequences."""

    def __init__(self, config: Config):
        self._config = config

    def __len__(self) -> int:
        return len(HELD_OUT)

    def examples(self, indices: list[int]) -> Batch:
        return batch_of(self._config, [-1 if index < 0 else HELD_OUT[index] for index in indices])


class EngineRun:
    """An engine, in this process group, and the steps it takes."""

    def __init__(self, config: Config):
        self.config = config
        self.trainee = build_trainee(config, torch.device("cpu"))
        self.engine = self.trainee.engine

    def steps(self, first: int, last: int, spoil: int | None = None) -> list[tuple]:
        """Take steps first..last. Returns [(loss, grad_norm, skipped)]. Step `spoil` gets a NaN gradient."""
        config, outcomes = self.config, []
        batches = micro_batches(config, (first - 1) * config.train.global_batch, self.trainee.where.dp)
        for step in range(first, last + 1):
            accumulate = self.engine.accumulation
            mine = [self.trainee.part(batch_of(config, next(batches))) for _ in range(accumulate)]
            self.engine.set_learning_rate(learning_rate(step, 20, config.optim))
            self.engine.set_step(step)
            handle = None
            if step == spoil and dist.get_rank() == dist.get_world_size() - 1:
                handle = self.engine.module.register_forward_hook(
                    lambda module, args, out: out._replace(loss_sum=out.loss_sum * torch.inf)
                )
            out = outcome(self.trainee.step(mine, tokens_on_device(config, step)).tolist(), self.trainee.learner.layout)
            if handle:
                handle.remove()
            outcomes.append((out.loss, out.grad_norm, out.skipped))
        return outcomes

    def loss_of_average(self) -> float | None:
        """Held-out loss with the averaged weights, over four sequences; None: there are no averaged weights."""
        if not self.trainee.has_ema:
            return None
        with self.trainee.averaged():
            return self.trainee.held_out_loss(HeldOut(self.config), torch.device("cpu"))[0]

    def fragments(self) -> dict[str, torch.Tensor]:
        return take_snapshot(self.engine).tensors


def stale_copies(module: nn.Module) -> list[str]:
    """Names of the parameters whose bf16 copy, with which layers compute, differs from the parameter's value."""
    return [
        f"{layer_name}.{name}"
        for layer_name, layer in module.named_modules()
        for name, copy in getattr(layer, "working", {}).items()
        if not torch.equal(copy, layer._parameters[name].bfloat16())
    ]


def engine_over_another_start(config: Config) -> tuple[list[str], torch.Tensor]:
    """(`stale_copies` of a new engine, one of its weights), if each process initialised the module differently."""
    module = build(config.model)
    module.init_weights(dist.get_rank())
    engine = Engine(module, config)
    return stale_copies(engine.module), engine.module.lm_head._parameters["weight"].detach().clone()


def engine_losses(config: Config, steps: int, spoil: int | None = None) -> tuple[list, dict]:
    """(outcomes, this process's fragments)."""
    run = EngineRun(config)
    outcomes = run.steps(1, steps, spoil)
    return outcomes, run.fragments()


def all_losses(configs: list[Config], steps: int) -> list[tuple]:
    """`engine_losses` of each config."""
    return [engine_losses(config, steps) for config in configs]


def all_averages(configs: list[Config], steps: int) -> list[tuple]:
    """`engine_losses` of each config, with an evaluation of the averaged weights before the last step: (outcomes,
    fragments, held-out loss)."""
    found = []
    for config in configs:
        run = EngineRun(config)
        outcomes = run.steps(1, steps - 1)
        loss = run.loss_of_average()
        found.append((outcomes + run.steps(steps, steps), run.fragments(), loss))
    return found


def bare_losses(config: Config, steps: int) -> tuple[list, dict]:
    """The same training in plain PyTorch in one process, whatever the topology. Returns (outcomes, weights),
    with the weights' average as `ema/NAME` if the config asks for one."""
    outcomes, weights, _ = bare_averages(config, steps)
    return outcomes, weights


def bare_averages(config: Config, steps: int) -> tuple[list, dict, float | None]:
    """As `bare_losses`, with the averaged weights' held-out loss before the last step."""
    module = build(config.model)
    module.init_weights(0)
    averaged = AveragedModel(module) if config.optim.ema_decay else None
    if averaged:
        averaged.update_parameters(module)  # the average starts from the first weights it is given
    tap = RouterTap(module, config.model) if config.model.is_moe else None
    optimizer = build_optimizer(parameter_groups(module, config.optim), config.optim)
    size, outcomes, held_out = config.train.micro_batch, [], None
    for step in range(1, steps + 1):
        if averaged and step == steps:
            with torch.no_grad():
                found = averaged.module.eval()(batch_of(config, list(HELD_OUT)))
            held_out = (found.loss_sum / found.tokens).item()
        first = (step - 1) * config.train.global_batch
        count = -(-config.train.global_batch // size)
        tokens, total, loads = tokens_of(config, step), 0.0, []
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, config.optim)
        for i in range(count):
            out = module(batch_of(config, list(range(first + i * size, first + (i + 1) * size))))
            loss = out.loss_sum / tokens
            total += loss.item()
            if tap and (router := tap.collect()):
                balance = config.model.aux_loss_weight * router.aux_loss + config.model.z_loss_weight * router.z_loss
                loss = loss + balance / count
                loads.append(router.load)
            loss.backward()
        limit = config.train.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
        optimizer.step()
        for chooser, load in zip(tap.choosers if tap else [], torch.stack(loads).mean(0) if loads else [], strict=True):
            if chooser.global_load is not None:
                chooser.global_load = load
            if chooser.bias is not None:
                short = 1 / len(load) - load
                chooser.bias = chooser.bias + config.model.router_bias_rate * short.sign() * (short.abs() > 1e-6)
        outcomes.append((total, norm.item(), False))
        if averaged:
            assert config.optim.ema_decay
            averaged.multi_avg_fn = get_ema_multi_avg_fn(min(config.optim.ema_decay, (1 + step) / (10 + step)))
            averaged.update_parameters(module)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    if averaged:
        weights |= {f"{EMA}/{name}": parameter.detach() for name, parameter in averaged.module.named_parameters()}
    return outcomes, weights, held_out


def assemble(fragments: list[dict[str, torch.Tensor]], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole weights from the fragments of all processes; NaN where one is missing, an error where two overlap."""
    whole = {name: torch.full(weight.shape, torch.nan) for name, weight in weights.items()}
    for part in fragments:
        for entry, tensor in part.items():
            state, name, start, box = parse_key(entry)
            name = name if state == MASTER else f"{state}/{name}"
            if name in whole:
                box = box or full_box(whole[name].shape)
                for at, run in runs(box, start, start + tensor.numel()):
                    place = whole[name][within(full_box(whole[name].shape), run)]
                    assert place.isnan().all(), f"{name} is written twice"
                    place.copy_(tensor[at - start : at - start + place.numel()].view_as(place))
    return whole


def save_and_continue(config: Config, path, first: int, last: int, world_tag: str) -> list:
    """Train to `first`, write a checkpoint, continue to `last`; returns the later outcomes."""
    from trainer.checkpoint.store import commit, write_shard
    from trainer.state import TrainState

    run = EngineRun(config)
    run.steps(1, first)
    write_shard(path, dist.get_rank(), world_tag, take_snapshot(run.engine))
    if dist.get_rank() == 0:
        commit(path, dist.get_world_size(), world_tag, TrainState(step=first), {}, 60)
    dist.barrier()
    return run.steps(first + 1, last)


def load_and_continue(config: Config, path, first: int, last: int) -> tuple[dict, list]:
    """Load a checkpoint into a fresh engine, take its fragments, continue to `last`."""
    run = EngineRun(config)
    restore(run.engine, Reader(path))
    fragments = run.fragments()
    return fragments, run.steps(first + 1, last)


def load_again(config: Config, path, first: int, last: int) -> tuple[list, list]:
    """Outcomes of the steps after a checkpoint: in the engine that wrote it, and in one resumed from it."""
    went_on = save_and_continue(config, path, first, last, "back")
    run = EngineRun(config)
    run.steps(1, last)
    restore(run.engine, Reader(path))
    return went_on, run.steps(first + 1, last)


def pass_on(config: Config, source, target, step: int, last: int) -> list[tuple]:
    """Load a checkpoint of `step` into a fresh engine, write it again to `target`, continue to `last`."""
    from trainer.checkpoint.store import commit, write_shard
    from trainer.state import TrainState

    run = EngineRun(config)
    restore(run.engine, Reader(source))
    write_shard(target, dist.get_rank(), "again", take_snapshot(run.engine))
    if dist.get_rank() == 0:
        commit(target, dist.get_world_size(), "again", TrainState(step=step), {}, 60)
    dist.barrier()
    return run.steps(step + 1, last)


def write_run(config: Config, run_dir: Path) -> None:
    """Write a run's checkpoints of steps 1 and 2."""
    from trainer.checkpoint.manifest import folder
    from trainer.checkpoint.store import commit, write_shard
    from trainer.state import TrainState

    run = EngineRun(config)
    for step in (1, 2):
        run.steps(step, step)
        write_shard(folder(run_dir, step), dist.get_rank(), "t", take_snapshot(run.engine))
        if dist.get_rank() == 0:
            state = TrainState(step, config.train.global_batch * step)
            commit(folder(run_dir, step), dist.get_world_size(), "t", state, config.model_dump(mode="json"), 60)
        dist.barrier()


def resume_each(config: Config, run_dirs: list[Path]) -> list[int]:
    """Resume runs one after another in one engine. Returns the step that each resumes from."""
    from trainer.checkpoint.resume import resume
    from trainer.record.lines import Record
    from trainer.state import TrainState

    run, steps = EngineRun(config), []
    for run_dir in run_dirs:
        state, record = TrainState(), Record(run_dir, 1) if dist.get_rank() == 0 else None
        resume(run_dir, [run.engine], state, run.trainee.learner, record)
        if record:
            record.close()
        steps.append(state.step)
    return steps


def gathered() -> tuple[list, int, list]:
    """By `everyones`: (the whole, where the own part begins, the own part's gradient), where each process counts
    squares once more."""
    from trainer.engine.parallel import everyones

    rank = dist.get_rank()
    own = torch.arange(4.0).view(2, 2) + 10 * rank
    own.requires_grad_()
    whole, first = everyones(own)
    ((rank + 1) * whole.square().sum()).backward()
    assert own.grad is not None
    return whole.tolist(), first, own.grad.tolist()

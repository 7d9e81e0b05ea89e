"""bf16 at ZeRO-0: copies that follow their parameters, and the gradients of a cast that is part of the graph."""

import pytest
import tiny_models as tiny
import torch
from engines import EngineRun, bare_losses, batch_of, engine_losses, engine_over_another_start, stale_copies
from support import resolved
from torch import nn

from configs import Config, ConfigError
from models.families import build
from models.moe.balance import RouterTap
from models.moe.router import Router
from trainer.checkpoint.manifest import folder
from trainer.checkpoint.resume import roll_back
from trainer.checkpoint.save import Saver, restore
from trainer.checkpoint.store import Reader
from trainer.engine.guard import guard
from trainer.engine.precision import WorkingCopies, check_device
from trainer.engine.start import start_processes
from trainer.state import TrainState

BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


def cast_in_graph(module: nn.Module) -> nn.Module:
    """The oracle: each layer casts its fp32 parameters wherever it uses them."""

    def cast(name: str) -> property:
        return property(lambda layer: layer._parameters[name].to(BF16))

    for layer in module.modules():
        if layer._parameters and not isinstance(layer, Router):
            names = [name for name, parameter in layer._parameters.items() if parameter is not None]
            layer.__class__ = type("Cast", (type(layer),), {name: cast(name) for name in names})
    return module


def with_copies(module: nn.Module) -> nn.Module:
    WorkingCopies(module, BF16)
    return module


def gradients(module: nn.Module, model, seeds: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(gradient of every parameter after a backward pass over the batch of each seed; the last loss)."""
    tap = RouterTap(module, model) if model.is_moe else None
    for parameter in module.parameters():
        parameter.grad = None
    for seed in seeds:
        loss = module(tiny.batch(seed=seed)).loss_sum
        if tap:
            stats = tap.collect()
            loss = loss + stats.aux_loss + stats.z_loss
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}, loss.detach()


MODELS = {
    "dense": {"num_experts": 0},
    "experts": {"shared_expert_size": 16, "first_dense_layers": 1},
    "sigmoid": {"router": "sigmoid", "router_bias_rate": 0.01},
    "an expert nobody chose": {"num_experts": 16, "top_k": 1, "router": "hash"},
    "many chunks": {"loss_chunk": 16},
    "tied": {"tie_embeddings": True},
}


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_a_cast_in_the_graph(name, recompute):
    model = tiny.config(**MODELS[name])
    ours, theirs = with_copies(tiny.model(model).train()), cast_in_graph(tiny.model(model).train())
    for module in (ours, theirs):
        module.set_activation_checkpointing(recompute)
    (found, loss), (wanted, expected) = (gradients(module, model, [0]) for module in (ours, theirs))
    assert torch.equal(loss, expected)
    assert found.keys() == wanted.keys()
    if name == "tied":  # the table's two gradients are summed before they are cast to fp32
        wanted["model.embed_tokens.weight"] = wanted["model.embed_tokens.weight"].to(BF16).float()
    for key, gradient in wanted.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], gradient), key


def test_micro_batches_are_summed_in_fp32():
    model = tiny.config()
    module = with_copies(tiny.model(model).train())
    first, second, both = (gradients(module, model, seeds)[0] for seeds in ([0], [1], [0, 1]))
    for name, gradient in both.items():
        assert torch.equal(gradient, first[name] + second[name]), name
    down = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(both[down], both[down].to(BF16).float()), "bf16 would have done"


def test_parameters_keep_their_names_places_and_dtypes():
    model = tiny.config()
    module = tiny.model(model)
    before, state = dict(module.named_parameters()), module.state_dict()
    with_copies(module)
    after = dict(module.named_parameters())
    assert [*after] == [*before]
    assert all(after[name] is parameter for name, parameter in before.items())
    assert dict(module.named_buffers()) == {}
    assert [*module.state_dict()] == [*state]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert module.lm_head.weight.dtype == BF16
    assert {part.weight.dtype for part in module.modules() if isinstance(part, Router)} == {torch.float32}


def test_frozen_and_unused_parameters():
    """They get no gradient, are left alone by the optimizer, and can be used again at the next step."""
    module = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("used", "frozen", "now_and_then")})
    module["frozen"].requires_grad_(False)
    before = {name: layer.weight.detach().clone() for name, layer in module.items()}
    masters = {name: layer._parameters["weight"] for name, layer in module.items()}
    optimizer = torch.optim.AdamW([p for p in masters.values() if p.requires_grad], lr=0.1)
    guard(optimizer, 1.0, WorkingCopies(module, BF16))
    x = torch.ones(2, 4, dtype=BF16)

    def step(*names: str) -> list[str]:
        """Names of the parameters that have changed."""
        was = {name: master.detach().clone() for name, master in masters.items()}
        for name in names:
            module[name](module["frozen"](x)).sum().backward()
        optimizer.step()
        assert stale_copies(module) == []
        assert masters["frozen"].grad is None
        optimizer.zero_grad()
        return [name for name, master in masters.items() if not torch.equal(master, was[name])]

    assert step("used") == ["used"]
    assert step("used", "now_and_then") == ["used", "now_and_then"]
    assert step("used") == ["used"]
    assert torch.equal(masters["frozen"], before["frozen"])


def config(optim: str = "adamw", dp: int = 1, **sections) -> Config:
    return resolved(
        train={"micro_batch": 1, "global_batch": 4, "precision": "bf16"} | sections.pop("train", {}),
        optim={"name": optim, "warmup": 2, "lr": 1e-2},
        parallel={"dp": dp},
        **sections,
    )


def weights(run: EngineRun) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.engine.module.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "adagrad", "lion", "muon"])
def test_copies_follow_steps_and_skipped_steps(optim):
    run = EngineRun(config(optim))
    assert stale_copies(run.engine.module) == []
    seen = [weights(run)]
    for step in (1, 2, 3, 4):
        ((_, _, skipped),) = run.steps(step, step, spoil=3)
        assert skipped == (step == 3)
        assert stale_copies(run.engine.module) == []
        seen.append(weights(run))
        assert equal(*seen[-2:]) == skipped


def test_copies_follow_a_restored_checkpoint_and_a_rollback(tmp_path):
    settings = config()
    run, state = EngineRun(settings), TrainState(step=2, cursor=8)
    run.steps(1, 2)
    saved = weights(run)
    Saver(tmp_path, settings.model_dump(mode="json"), None, background=False, timeout_s=60).save([run.engine], state, 1)
    went_on = run.steps(3, 5)

    other = EngineRun(settings)
    restore(other.engine, Reader(folder(tmp_path, 2)))
    assert equal(weights(other), saved)
    assert stale_copies(other.engine.module) == []
    assert other.steps(3, 5) == went_on

    state.step, state.cursor = 5, 20
    roll_back(tmp_path, [run.engine], state, settings, None)
    assert (state.step, state.cursor) == (2, 20)
    assert equal(weights(run), saved)
    assert stale_copies(run.engine.module) == []
    assert run.steps(3, 5) == went_on


@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_and_samples_after_a_step_use_the_new_weights(tied):
    settings = config(model={"tie_embeddings": tied})
    run = EngineRun(settings)
    run.steps(1, 2)
    plain = build(settings.model)
    plain.load_state_dict(run.engine.module.state_dict())
    cast_in_graph(plain).eval()
    run.engine.eval()
    batch = batch_of(settings, [50, 51])
    with torch.no_grad():
        assert torch.equal(run.engine(batch).loss_sum, plain(batch).loss_sum)
        assert torch.equal(run.engine.module.logits(batch), plain.logits(batch))


@pytest.mark.few(1)
@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True}, {"num_experts": 16, "top_k": 1}])
def test_two_processes_equal_one(pair, model):
    """Gradients are of the same micro-batches, scaled by a power of two: only the order of the fp32 sums differs."""
    alone, _ = engine_losses(config(model=model), 5)
    together = pair(engine_losses, config(dp=2, model=model), 5)
    assert together[0][0] == together[1][0]
    for ours, theirs in zip(together[0][0], alone, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-4)
    fp32, _ = bare_losses(config(model=model), 5)
    assert [loss for loss, _, _ in alone] == pytest.approx([loss for loss, _, _ in fp32], rel=2e-3)


def test_copies_are_of_rank_0s_broadcast_weights(pair):
    """DeepSpeed gives all processes rank 0's parameters, even if another machine initialised others from the seed."""
    (stale, weight), (others_stale, others_weight) = pair(engine_over_another_start, config(dp=2))
    assert torch.equal(weight, others_weight)
    assert stale == others_stale == []


def test_fp16_is_refused_on_a_cpu_before_a_model_is_built():
    config = resolved(train={"precision": "fp16"})
    with pytest.raises(ConfigError, match=r"train\.precision=fp16 needs a GPU.*set it to bf16 or fp32"):
        check_device(config, torch.device("cpu"))
    check_device(config, torch.device("cuda"))
    check_device(resolved(train={"precision": "bf16"}), torch.device("cpu"))

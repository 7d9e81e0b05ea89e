"""The engine at every ZeRO stage, in one process and two, against a bare PyTorch loop."""

import pytest
import torch
from engines import assemble, bare_losses, engine_losses, gathered
from support import resolved

from trainer.engine.start import start_processes

STEPS = 8
SLOW = pytest.mark.slow


def config(stage: int, dp: int, optim: str = "adamw", **train):
    lr = {"adamw": 1e-3, "sgd": 0.1, "adagrad": 1e-2, "rmsprop": 1e-4, "lion": 1e-4, "adam": 1e-3}.get(optim, 1e-3)
    return resolved(
        train={"micro_batch": 1, "global_batch": 4} | train,
        optim={"name": optim, "lr": lr, "warmup": 2, "momentum": 0.9, "eps": 1e-6, "ema_decay": 0.4},
        parallel={"zero_stage": stage, "dp": dp},
    )


def check(made, expected, fragments):
    (outcomes, weights) = expected
    for (loss, norm, skipped), (loss0, norm0, _) in zip(made, outcomes, strict=True):
        assert not skipped
        assert loss == pytest.approx(loss0, rel=1e-5)
        assert norm == pytest.approx(norm0, rel=1e-4)
    whole = assemble(fragments, weights)
    for name, weight in weights.items():
        assert (whole[name] - weight).norm() <= 1e-4 * weight.norm() + 1e-7, name


@pytest.fixture(scope="module", autouse=True)
def group():
    start_processes(60)


ENDS = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])


@pytest.mark.few(2)
@ENDS
@pytest.mark.parametrize(("optim", "clip"), [("sgd", 0.0), ("adamw", 0.5)])
def test_one_process_equals_bare_loop(stage, optim, clip):
    settings = config(stage, 1, optim, grad_clip=clip)
    made, fragments = engine_losses(settings, STEPS)
    check(made, bare_losses(settings, STEPS), [fragments])


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("stage", "optim", "clip"),
    [
        pytest.param(stage, optim, clip, marks=SLOW if (stage + number) % 2 else [])
        for number, (optim, clip) in enumerate({"sgd": 0.0, "adamw": 0.5}.items())
        for stage in range(4)
    ],
)
def test_two_processes_equal_bare_loop(pair, stage, optim, clip):
    """Unequal token counts per sequence: gradients average over tokens, not over processes."""
    settings = config(stage, 2, optim, grad_clip=clip)
    results = pair(engine_losses, settings, STEPS)
    check(results[0][0], bare_losses(settings, STEPS), [fragments for _, fragments in results])


@pytest.mark.few(3)
@pytest.mark.parametrize("optim", ["adam", "adagrad", "rmsprop", "lion"])
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=SLOW), 3])
def test_optimizers_equal_bare_loop_at_every_stage(stage, optim):
    settings = config(stage, 1, optim)
    made, fragments = engine_losses(settings, 4)
    check(made, bare_losses(settings, 4), [fragments])


@pytest.mark.parametrize("optim", ["adafactor", "muon"])
def test_whole_matrix_optimizers_at_stage_0(optim):
    settings = config(0, 1, optim)
    made, fragments = engine_losses(settings, 4)
    check(made, bare_losses(settings, 4), [fragments])


def test_indivisible_batch_is_padded_with_weight_zero(pair):
    """5 sequences, micro-batches of 2, two processes: 4 micro-batches, the last one all padding."""
    settings = config(1, 2, "sgd", global_batch=5, micro_batch=2, grad_clip=0.0)
    dense = settings.model_copy(update={"model": settings.model.model_copy(update={"num_experts": 0})})
    results = pair(engine_losses, dense, 4)
    alone = dense.model_copy(
        update={
            "train": dense.train.model_copy(update={"micro_batch": 5}),
            "parallel": dense.parallel.model_copy(update={"dp": 1}),
        }
    )
    check(results[0][0], bare_losses(alone, 4), [fragments for _, fragments in results])


@pytest.mark.few(2)
@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("dp", [1, 2])
def test_bf16_at_stage_0_is_mixed_precision(pair, optim, dp):
    """Losses are within bf16's noise of fp32's, and fp32 masters keep steps far below a bf16 weight's resolution."""
    settings = config(0, dp, optim, precision="bf16")
    small = settings.model_copy(update={"optim": settings.optim.model_copy(update={"lr": 1e-6})})
    results = pair(engine_losses, small, STEPS) if dp == 2 else [engine_losses(small, STEPS)]
    outcomes, weights = bare_losses(small, STEPS)
    assert [loss for loss, _, _ in results[0][0]] == pytest.approx([loss for loss, _, _ in outcomes], rel=2e-3)
    assert [norm for _, norm, _ in results[0][0]] == pytest.approx([norm for _, norm, _ in outcomes], rel=2e-2)
    whole = assemble([fragments for _, fragments in results], weights)
    start = assemble([engine_losses(small, 0)[1]], weights)
    for name, weight in weights.items():
        assert whole[name].dtype == torch.float32
        moved, expected = whole[name] - start[name], weight - start[name]
        assert (moved - expected).norm() <= 0.25 * expected.norm(), name


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"),
     *(pytest.param(*case, marks=SLOW) for case in [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])],
)  # fmt: skip
def test_infinite_loss_on_one_process_skips_the_step_on_all(pair, stage, precision):
    settings = config(stage, 2, precision=precision)
    clean = pair(engine_losses, settings, 2)
    spoiled = pair(engine_losses, settings, 3, 3)
    for (_, before), (outcomes, after) in zip(clean, spoiled, strict=True):
        assert [skipped for _, _, skipped in outcomes] == [False, False, True]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step changed the state"


def test_what_all_processes_gather_has_the_gradient_of_every_one(pair):
    found = pair(gathered)
    whole = [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert [each[:2] for each in found] == [(whole, 0), (whole, 2)]
    for _, first, gradient in found:  # of 1 + 2 times the squares
        assert gradient == [[6 * number for number in row] for row in whole[first : first + 2]]

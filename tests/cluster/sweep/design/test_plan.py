"""The trials of a sweep: exact budgets, equal sizes, rules by hand, branches, searches that can be replayed."""

import math
from itertools import pairwise

import pytest

from cluster.sweep.design.plan import plan
from cluster.sweep.design.rules import Rules, course, step_law_batch, step_law_lr
from cluster.sweep.design.search import optuna_draws
from cluster.sweep.design.sizes import Sizer, batch_and_steps, conventions, spaced
from configs import ConfigError, ModelConfig, from_dict, resolve, to_yaml
from configs.load import read_tree
from configs.sweep.definition import ShapeRule, sweep_from_dict
from configs.sweep.designs import Axis, OptunaDesign
from models.planning.cost import parameters, training_flops_per_token
from trainer.schedule import learning_rate

TINY = {"head_dim": 16, "aspect_ratio": 32, "ffn_multiple": 16}
VOCABULARY = 512


def sweep_of(**keys):
    return sweep_from_dict({"base": "dense-small", "shape": TINY} | keys)


def trials_of(**keys):
    return plan(sweep_of(**keys), VOCABULARY).trials


MOE = {"experts": 8, "top_k": 1, "granularity": 2}


@pytest.mark.parametrize("seq_len", [64, 256])
@pytest.mark.parametrize("variants", [
    {"dense": {}}, {"dense": {}, "moe": MOE}, {"dense": {}, "moe": {"experts": [4, 16], "top_k": 2}},
    {"sparse": {"sparsity": [0.5, 0.75], "experts": 8, "shared": 1}}],
    ids=["dense", "moe", "top2", "sparse"])  # fmt: skip
def test_every_trial_spends_its_budget(variants, seq_len):
    budgets = [4e12, 1.47e13, 1e14, 1e17]
    trials = trials_of(isoflop={"budgets": budgets}, variants=variants, set={"train.seq_len": seq_len})
    arms = sum(len(v.choices()) for v in sweep_of(isoflop={"budgets": [1]}, variants=variants).variants.values())
    assert len(trials) == 5 * len(budgets) * arms
    assert len({trial.name for trial in trials}) == len(trials)
    for trial in trials:
        resolved, _ = resolve(trial.config, vocab_size=VOCABULARY)
        tokens = resolved.train.steps * resolved.train.global_batch * resolved.train.seq_len
        flops = tokens * training_flops_per_token(resolved.model, seq_len)
        assert trial.flops == pytest.approx(flops, rel=1e-12)
        assert flops == pytest.approx(trial.budget, rel=0.01)
        assert trial.tokens == tokens
        assert trial.counts == parameters(resolved.model)
        assert trial.config.run.root == "runs/sweep/trials"


def test_architectures_are_compared_at_equal_active_sizes():
    trials = trials_of(isoflop={"budgets": [1e14, 1e15]}, variants={"dense": {}, "moe": MOE})
    pairs = list(zip(trials[::2], trials[1::2], strict=True))
    for dense, moe in pairs:
        assert (dense.variant, moe.variant, dense.budget) == ("dense", "moe", moe.budget)
        assert moe.counts.active == pytest.approx(dense.counts.active, rel=0.02)
        assert moe.counts.experts == moe.resolved.model.num_experts * 3 * sum(
            moe.resolved.model.is_moe_layer(i) for i in range(moe.resolved.model.num_layers)
        ) * moe.resolved.model.hidden_size * moe.resolved.model.expert_size  # fmt: skip
        assert (moe.resolved.model.num_experts, moe.resolved.model.top_k) == (16, 2)
        assert moe.resolved.model.expert_size * 2 == dense.resolved.model.intermediate_size


@pytest.mark.parametrize("count", ["total", "active", "without_embeddings", "with_head"])
def test_the_centre_has_the_tokens_that_were_asked_for(count):
    trials = trials_of(isoflop={"budgets": [1e15, 1e17], "sizes": 3, "tokens_per_parameter": 30, "spread": 4},
                       count=count)  # fmt: skip
    for budget in (1e15, 1e17):
        sizes = [conventions(t.counts)[count] for t in trials if t.budget == budget]
        centre = next(t for t in trials if t.budget == budget and conventions(t.counts)[count] == sizes[1])
        assert centre.tokens / sizes[1] == pytest.approx(30, rel=0.2)
        assert sizes[1] / sizes[0] == pytest.approx(4, rel=0.2)
        assert sizes[2] / sizes[1] == pytest.approx(4, rel=0.2)


def test_shapes_follow_their_rule():
    model = ModelConfig(vocab_size=32000)
    sizer = Sizer(model, ShapeRule(head_dim=128, kv_group=4, aspect_ratio=128), None, 1, "without_embeddings", 2048)
    for target in (3e8, 2e9, 7e9):
        keys = sizer.shape(target)
        assert sizer.n(keys) == pytest.approx(target, rel=0.05)
        assert keys["hidden_size"] == keys["num_heads"] * 128
        assert keys["num_heads"] == 4 * keys["num_kv_heads"]
        assert keys["intermediate_size"] % 64 == 0
        assert 0 <= keys["intermediate_size"] - keys["hidden_size"] * 8 / 3 < 64
        assert keys["hidden_size"] / keys["num_layers"] == pytest.approx(128, rel=0.6)
        assert sizer.shape(target, taken=[(keys["hidden_size"], keys["num_layers"])]) != keys


def test_spacing():
    assert spaced(100, 4, 3) == pytest.approx([25, 100, 400])
    assert spaced(100, 4, 1) == [100]


def test_steps_and_batch_are_chosen_together():
    assert batch_and_steps([1000.0], 8, 1) == (8, [125])
    assert batch_and_steps([53.0], 8, 1) == (1, [53]), "9 x 6 is 2% more, and 53 a prime number"
    assert batch_and_steps([52.4], 8, 1) == (13, [4]), "8 x 7 is 7% more, 13 x 4 within 1%"
    assert batch_and_steps([10.5], 4, 1) is None
    assert batch_and_steps([1000.0, 3000.0], 30, 16) == (32, [31, 94])
    assert batch_and_steps([100.0], 8, 1, fixed=True) is None, "12.5 steps"
    assert batch_and_steps([1000.0], 8, 1, fixed=True) == (8, [125])


def test_step_law_by_hand():
    """N = 1e9, D = 1e11: 10^(log10 1.79 - 6.417 + 3.377) and 10^(log10 0.58 + 6.281)."""
    assert step_law_lr(1e9, 1e11) == pytest.approx(1.6325e-3, rel=1e-3)
    assert step_law_batch(1e11) == pytest.approx(1.1077e6, rel=1e-3)
    trial = trials_of(isoflop={"budgets": [1e19], "sizes": 1}, shape={}, set={"train.seq_len": 2048})[0]
    counts, train = trial.counts, trial.config.train
    n = counts.active - counts.embedding - counts.head
    assert trial.config.optim.lr == pytest.approx(1.79 * n**-0.713 * trial.tokens**0.307, rel=1e-3)
    assert train.global_batch * 2048 == pytest.approx(0.58 * trial.tokens**0.571, rel=0.02)
    assert trial.config.optim.warmup == round(0.05 * train.steps)
    assert trial.config.optim.schedule == "cosine"
    optim = trial.config.optim
    assert learning_rate(train.steps, train.steps, optim) == pytest.approx(optim.lr * optim.min_lr_ratio)


def test_other_rules():
    rules = {"lr": "inverse_width", "batch": "fixed", "warmup": 0.1, "schedule": "wsd", "decay": 0.25}
    trials = trials_of(isoflop={"budgets": [1e14]}, rules=rules)
    base = from_dict(read_tree("dense-small"))
    for trial in trials:
        config = trial.config
        assert config.optim.lr == pytest.approx(base.optim.lr * 192 / config.model.hidden_size, rel=1e-3)
        assert config.train.global_batch == base.train.global_batch
        assert config.optim.warmup == round(0.1 * config.train.steps)
        assert config.optim.decay_steps == round(0.25 * config.train.steps)
    fixed = trials_of(isoflop={"budgets": [1e14], "sizes": 1}, rules={"lr": "fixed", "lr_scale": [0.5, 1, 2]})
    assert [trial.config.optim.lr for trial in fixed] == [1e-3, 2e-3, 4e-3]
    assert [trial.name[-6:] for trial in fixed] == ["lrx0.5", "k-lrx1", "k-lrx2"]
    held = trials_of(isoflop={"budgets": [1e13], "sizes": 1}, rules={"max_lr": 0.003})
    assert held[0].config.optim.lr == 0.003


def test_axes_and_seeds_are_crossed():
    trials = trials_of(isoflop={"budgets": [1e14], "sizes": 2}, axes={"optim.lr": [1e-3, 2e-3]}, seeds=[0, 7])
    assert len(trials) == 8
    assert {(t.config.optim.lr, t.config.run.seed) for t in trials} == {(x, s) for x in (1e-3, 2e-3) for s in (0, 7)}
    lengths = trials_of(isoflop={"budgets": [1e14], "sizes": 1}, axes={"train.seq_len": [64, 512]})
    assert [t.config.train.seq_len for t in lengths] == [64, 512]
    assert all(abs(t.flops / 1e14 - 1) < 0.01 for t in lengths)


def test_names_do_not_depend_on_what_else_is_planned():
    few = trials_of(isoflop={"budgets": [1e13, 1e14]}, variants={"dense": {}})
    many = trials_of(isoflop={"budgets": [1e12, 1e13, 1e14]}, variants={"dense": {}, "moe": {"experts": 4}})
    by_name = {trial.name: trial for trial in many}
    assert all(by_name[trial.name].config == trial.config for trial in few)


@pytest.mark.parametrize("design", [
    {"ladder": {"parameters": [3e5, 1e6], "tokens_per_parameter": [40, 10, 20]}},
    {"isoflop": {"budgets": [3e13, 1e13, 1e14], "parameters": [3e5, 1e6]}}], ids=["ladder", "isoflop"])  # fmt: skip
@pytest.mark.parametrize("every", [0, 100, "auto", 10**6])
def test_branches(design, every):
    trials = trials_of(**design, rules={"schedule": "wsd_branches"}, set={"checkpoint.every": every})
    chains = [trials[:3], trials[3:]]
    for chain in chains:
        assert [trial.after for trial in chain] == [None, chain[0].name, chain[1].name]
        assert [trial.tokens for trial in chain] == sorted(trial.tokens for trial in chain)
        configs = [trial.config for trial in chain]
        assert len({(c.train.global_batch, c.optim.lr, c.optim.warmup, c.model) for c in configs}) == 1
        for before, after in pairwise(chain):
            step, steps, kept = after.from_step, before.config.train.steps, before.config.checkpoint
            assert step % kept.every == 0
            assert [s for s in range(kept.every, steps, kept.every) if s % kept.keep_every == 0] == [step]
            for s in (1, step // 2, step):  # up to this step both are the same run
                rates = [learning_rate(s, t.config.train.steps, t.config.optim) for t in (before, after)]
                assert rates[0] == rates[1]
            assert learning_rate(step, steps, before.config.optim) == before.config.optim.lr
            assert learning_rate(step + 1, steps, before.config.optim) < before.config.optim.lr
            assert after.spent == pytest.approx(after.flops * (1 - step / after.config.train.steps))
        assert all(trial.flops == pytest.approx(trial.budget, rel=0.01) for trial in chain)


def test_the_first_chain_member_may_warm_up_for_all():
    rules = Rules("fixed", "fixed", 0.1, "wsd_branches")
    long, short = course(rules, 0.2, 1000, 100, 0, branch=False), course(rules, 0.2, 100, 100, 30, branch=True)
    assert long.optim["warmup"] == short.optim["warmup"] == 10
    assert (short.stable, short.checkpoint) == (78, {"every": 26, "keep_every": 78})
    assert long.checkpoint == {}


def test_random_search():
    keys = {"axes": {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.num_layers": {"low": 2, "high": 5},
                     "optim.betas": [[0.9, 0.95], [0.9, 0.99]]}}  # fmt: skip
    trials = trials_of(random={"n": 200, "budget": 1e13}, **keys)
    assert trials[:5] == trials_of(random={"n": 5, "budget": 1e13}, **keys), "more draws keep the first ones"
    rates = [trial.config.optim.lr for trial in trials]
    assert 1e-4 <= min(rates) < 2e-4
    assert 5e-3 < max(rates) <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) == pytest.approx(100, abs=30)
    assert {trial.config.model.num_layers for trial in trials} == {2, 3, 4, 5}
    assert {trial.config.optim.betas for trial in trials} == {(0.9, 0.95), (0.9, 0.99)}
    assert all(trial.flops == pytest.approx(1e13, rel=0.01) for trial in trials)
    assert trials[0].values["optim.lr"] == rates[0]


def test_grid_takes_the_config_as_it_is():
    trials = trials_of(grid={}, axes={"optim.lr": [1e-3, 2e-3], "train.global_batch": [4, 8]})
    base = from_dict(read_tree("dense-small"))
    assert [(t.config.optim.lr, t.config.train.global_batch) for t in trials] == [
        (1e-3, 4), (1e-3, 8), (2e-3, 4), (2e-3, 8)]  # fmt: skip
    assert trials[0].name == "lr0.001-global_batch4"
    assert trials[0].budget is None
    assert (trials[3].config.optim.warmup, trials[3].config.train.steps) == (base.optim.warmup, base.train.steps)
    architectures = trials_of(grid={"budget": 1e14}, variants={"dense": {}, "moe": MOE})
    assert [t.resolved.model.num_experts for t in architectures] == [0, 16]
    assert architectures[1].resolved.model.expert_size == 384 / 2


def test_optuna_is_replayed_from_the_losses():
    sweep = sweep_of(optuna={"n": 14, "startup": 6, "round": 4, "budget": 1e13},
                     axes={"optim.lr": {"low": 1e-5, "high": 1e-1, "log": True}})  # fmt: skip

    def loss(trial):
        return abs(math.log10(trial.config.optim.lr / 3e-3))

    found = plan(sweep, VOCABULARY)
    assert (len(found.trials), found.open) == (6, 8)
    losses = {}
    for expected in (10, 14, 14):
        losses |= {trial.name: loss(trial) for trial in found.trials}
        losses[found.trials[2].name] = math.nan  # it failed for good
        before, found = found, plan(sweep, VOCABULARY, losses)
        assert len(found.trials) == expected
        assert found.trials[: len(before.trials)] == before.trials
    assert found.open == 0


def test_optuna_learns_from_the_losses():
    axes = {"optim.lr": Axis(low=1e-5, high=1e-1, log=True), "optim.betas": Axis(values=((0.9, 0.95), (0.9, 0.99)))}
    design, losses = OptunaDesign(n=48), {}
    while True:
        draws, left = optuna_draws(design, axes, losses.get)
        losses |= {i: abs(math.log10(draw["optim.lr"] / 3e-3)) for i, draw in enumerate(draws)}
        if not left:
            break
    assert {draw["optim.betas"] for draw in draws} == {(0.9, 0.95), (0.9, 0.99)}
    assert sum(losses[i] for i in range(24, 48)) / 24 < 0.5, "at random it would be 1.1"


WRONG = {
    "too small": ({"isoflop": {"budgets": [1e9]}}, r"isoflop\.budgets=1e9: .* too small for 20 tokens per parameter: "
                  r"the smallest shape, hidden 16, has [\d,]+ active parameters"),
    "below": ({"isoflop": {"budgets": [1e12], "parameters": [100]}},
              r"a size of 100 \(active parameters\) is below the smallest shape's [\d,]+, hidden 16 and 2 layers"),
    "no steps": ({"isoflop": {"budgets": [3.1e8], "parameters": [1e4]}},
                 r"sequences of 256 tokens, and no whole number of steps with a batch that is a multiple of 1 is"),
    "fixed batch": ({"isoflop": {"budgets": [1e9], "parameters": [1e4]}, "rules": {"batch": "fixed"}},
                    r"steps of train\.global_batch=8, and no whole number of steps is within 1% of that"),
    "unknown key": ({"isoflop": {"budgets": [1e13]}, "set": {"optim.lrr": 1}},
                    r"^set: unknown key optim\.lrr: did you mean optim\.lr\?$"),
    "variant's key": ({"isoflop": {"budgets": [1e13]}, "variants": {"a": {"set": {"model": {"qk": 1}}}}},
                      r"^variants\.a\.set: unknown key model\.qk"),
    "axis": ({"grid": {}, "axes": {"optim.lr": [-1]}}, r"^axes optim\.lr=-1: optim\.lr=-1: should be greater than 0"),
    "chosen": ({"isoflop": {"budgets": [1e13]}, "set": {"train": {"steps": 3}}},
               r"^set: train\.steps is already set by the sweep \(the design\): leave it out"),
    "chosen by a rule": ({"isoflop": {"budgets": [1e13]}, "set": {"optim.lr": 3e-3}},
                         r"^set: optim\.lr is already set by the sweep \(rules\.lr=step_law\): set rules\.lr=fixed"),
    "topology": ({"isoflop": {"budgets": [1e14], "sizes": 1}, "set": {"parallel.tp": 7}},
                 r"^trial dense-1e14-\S+: parallel\.tp=7 .*tp splits attention by heads(.|\n)*\.tp comes from set"),
    "no branches": ({"isoflop": {"budgets": [1e13, 1e16]}, "rules": {"schedule": "wsd_branches"}},
                    r"wsd_branches needs sizes that are trained on several numbers of tokens"),
    "twice": ({"grid": {}, "axes": {"optim.lr": [1e-3, 1e-3]}}, "two trials would be named lr0.001"),
    "no number": ({"random": {}, "axes": {"optim.name": {"low": 1, "high": 2}}}, r"axes\.optim\.name is a range, but"),
    "half a layer": ({"random": {}, "axes": {"model.num_layers": {"low": 1.5, "high": 2}}}, r"low \(1\.5\)"),
    "width": ({"grid": {}, "variants": {"m": {"experts": 2, "granularity": 5}}}, r"does not divide the width"),
    "early stop": ({"isoflop": {"budgets": [1e13]}, "set": {"train.early_stop.patience": 2, "train.eval_every": 5}},
                   r"^train\.early_stop\.patience would end trials before they have spent their budget"),
    "optuna's seeds": ({"optuna": {}, "seeds": [0, 1], "axes": {"optim.lr": [1, 2]}}, "one loss per trial"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG.keys())
def test_refused(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(sweep_of(**keys), 64)
    assert len(str(caught.value).splitlines()) <= 3


def test_trials_read_back(tmp_path):
    from configs import load

    trial = trials_of(isoflop={"budgets": [1e13], "sizes": 1}, variants={"moe": MOE})[0]
    (tmp_path / "c.yaml").write_text(to_yaml(trial.config))
    assert load(tmp_path / "c.yaml") == trial.config

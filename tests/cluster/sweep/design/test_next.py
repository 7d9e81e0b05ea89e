"""The next run's config: its size, its budget within 1%, its experts; an ordinary run."""

import numpy as np
import pytest
from scaling_coverage import LAWS
from scaling_tables import Design, ladder, planted

from cluster.sweep.design.next_run import Best, config_for, next_trial, write
from cluster.sweep.design.sizes import conventions
from configs import ConfigError, load, resolve
from configs.sweep.definition import sweep_from_dict
from models.planning.cost import parameters, training_flops_per_token
from models.scaling.predictions import Forecast

SWEEP = sweep_from_dict({
    "name": "s", "root": "elsewhere", "base": "dense-small", "isoflop": {"budgets": [1e13]}, "seeds": [3, 4],
    "shape": {"head_dim": 16, "aspect_ratio": 32, "ffn_multiple": 16}, "axes": {"optim.lr": [1e-3]},
    "rules": {"lr": "fixed"},
    "variants": {"dense": {}, "moe": {"experts": [4, 8], "granularity": 2, "set": {"model.router_bias_rate": 0.01}}},
})  # fmt: skip


@pytest.mark.parametrize("convention", ["total", "active", "without_embeddings", "with_head"])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (16, 2), (32, 4)])
def test_size_and_budget(convention, experts, top_k):
    config = config_for(SWEEP, n=3e6, d=1e8, experts=experts, top_k=top_k, budget=2e15, convention=convention,
                        vocab_size=512)  # fmt: skip
    resolved, _ = resolve(config, vocab_size=512)
    counts, train, model = parameters(resolved.model), resolved.train, resolved.model
    assert conventions(counts)[convention] == pytest.approx(3e6, rel=0.15)
    flops = training_flops_per_token(model, train.seq_len) * train.steps * train.global_batch * train.seq_len
    assert flops == pytest.approx(2e15, rel=0.01)
    assert (model.num_experts, model.top_k if model.is_moe else 1) == (experts if experts > 1 else 0, top_k)
    assert model.router_bias_rate == (0.01 if experts > 1 else None)
    assert (config.run.name, config.run.root, config.run.seed) == ("s-next-2e15", "elsewhere", 3)


def test_without_a_budget_the_tokens_decide():
    trial, notes = next_trial(SWEEP, Best(3e6, 5e7), 512)
    assert trial.tokens == pytest.approx(5e7, rel=0.01)
    assert notes == ()
    trial, notes = next_trial(SWEEP, Best(3e6, 5e7), 512, budget=1e16)
    assert "5e+07 are predicted to be best" in notes[0]


def test_yaml_is_a_run(tmp_path):
    trial, notes = next_trial(SWEEP, Best(1e6, 1e7, 8, 2, "active"), 512, 1e14)
    text = write(trial, tmp_path / "new" / "next.yaml", ("said", *notes))
    assert text.startswith("# said\n")
    assert load(tmp_path / "new" / "next.yaml") == trial.config


def test_a_chain_ends_as_a_run_of_its_own():
    sweep = sweep_from_dict({"base": "dense-small", "rules": {"schedule": "wsd_branches"},
                             "ladder": {"parameters": [1e6], "tokens_per_parameter": [5, 20]}})  # fmt: skip
    trial, _ = next_trial(sweep, Best(1e7, 1e9), 512)
    assert (trial.after, trial.config.optim.schedule) == (None, "wsd")


@pytest.mark.parametrize(
    ("best", "sweep", "message"),
    [
        (Best(1e6, 1e7, convention="given"), SWEEP, "parameters counted as 'given' determine no shape"),
        (Best(1e2, 1e7), SWEEP, "is below the smallest shape's"),
        (Best(1e6, 1e7, 8, 16), SWEEP, "top_k=16 is over experts=8"),
        (
            Best(1e6, 1e7, 8, 1),
            SWEEP.model_copy(update={"variants": {}}),
            "experts=8: the sweep trains dense, but no Mixture",
        ),
        (Best(1e6, 1e2), SWEEP, "no whole number of steps"),
    ],
)
def test_refused(best, sweep, message):
    with pytest.raises(ConfigError, match=message):
        next_trial(sweep, best, 512)


def test_no_run_is_written_of_a_size_that_is_not_named():
    design = Design(ladder(1e8 * 4.0 ** np.arange(5), (20, 40)), 0.01)
    predicted = Forecast(planted(LAWS["Hoffmann et al."], design, 0)).at_budget(1e23)
    with pytest.raises(
        ConfigError, match=r"^no best size is given for 1e\+23 FLOPs: it may be anything from .* approach3$"
    ):
        Best.of(predicted)

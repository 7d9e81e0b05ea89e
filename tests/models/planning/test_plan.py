"""The planner's counts by hand, by the built module, and against a real engine's tensors; how they grow; no torch."""

import subprocess
import sys

import pytest
import torch
from support import resolved

from configs import Config, load, resolve
from models.decoder.attention import Visibility
from models.decoder.model import Shared
from models.families import build
from models.planning.activations import layer_activations
from models.planning.cost import parameters
from models.planning.devices import DEVICES, HEADROOM, cpu
from models.planning.memory import memory
from models.planning.plan import predict
from models.planning.search import search
from models.planning.shards import Group, groups, micro_batches, tensors
from models.rope import rope_tables
from trainer.engine.optim import parameter_groups

H100 = DEVICES["h100"]


def config(**sections) -> Config:
    """4 layers, 8 sequences of 32 tokens, fp32; dense unless asked."""
    sections["model"] = {"num_layers": 4, "num_experts": 0, "intermediate_size": 64} | sections.get("model", {})
    sections["train"] = {"global_batch": 8, "micro_batch": 2} | sections.get("train", {})
    return resolved(**sections)


def preset(name: str, *overrides: str) -> Config:
    return resolve(load(name, overrides), vocab_size=4096)[0]


def test_needs_no_torch():
    modules = "models.planning.plan, models.planning.search, cluster.commands.plan"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MODELS = {
    "dense": {},
    "moe": {"num_experts": 4, "expert_size": 16},
    "hash": {"num_experts": 4, "expert_size": 16, "router": "hash"},
    "some of all": {
        "shared_expert_gate": True,
        "num_layers": 5, "num_experts": 4, "moe_every": 2, "first_dense_layers": 2, "shared_expert_size": 24,
    },
    "tied, no qk-norm, biases": {"tie_embeddings": True, "qk_norm": False, "qkv_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_groups_are_those_of_the_trainer(model, optim):
    asked = config(model=model, optim={"name": optim})
    with torch.device("meta"):
        built = parameter_groups(build(asked.model), asked.optim)
    assert [g.sizes for g in groups(asked, 0)] == [[p.numel() for p in group["params"]] for group in built]
    assert sum(t.numel for t in tensors(asked)) == parameters(asked.model).total


def test_pipeline_stages_hold_the_model_between_them():
    for schedule in ("1f1b", "dualpipev"):
        asked = config(model=MODELS["moe"], parallel={"pp": 2, "pp_schedule": schedule, "zero_stage": 1})
        assert sum(t.numel for rank in range(2) for t in tensors(asked, rank)) == parameters(asked.model).total
    assert {t.head or t.embedding for t in tensors(asked, 1)} == {False}, "in a V both lie on the first rank"


def test_tensor_and_expert_parallel_split_what_they_split():
    whole = parameters(config().model)
    for tp in (1, 2):
        held = sum(t.numel for t in tensors(config(parallel={"tp": tp, "zero_stage": 1})))
        split = whole.attention + whole.dense
        assert held == whole.total - split + split // tp
    moe = parameters(config(model=MODELS["moe"]).model)
    held = sum(t.numel for t in tensors(config(model=MODELS["moe"], parallel={"dp": 4, "ep": 4, "zero_stage": 1})))
    assert held == moe.total - moe.experts * 3 // 4


def test_flat_groups():
    group = Group([10, 5, 4], shards=3, states=2)
    assert group.padded == 24  # 19, a multiple of 6
    assert group.touched() == [10, 10 + 5 + 4, 4]  # shares of 8: the second touches all three parameters
    assert group.parts() == 4 + 2 + 2


STATES = {
    # bytes per parameter of weights, gradients, optimizer; two processes share
    ("fp32", 0): (4, 4, 8),
    ("bf16", 0): (4 + 2, 4, 8),
    ("bf16", 1): (2, 4, 12 / 2),
    ("bf16", 2): (2, 4 / 2, 12 / 2),
}


@pytest.mark.parametrize(("precision", "stage"), STATES)
def test_states_by_hand(precision, stage):
    asked = config(train={"precision": precision}, parallel={"dp": 2, "zero_stage": stage})
    held, count = memory(asked, cpu=True), parameters(asked.model).total
    expected = [size * count for size in STATES[precision, stage]]
    assert [held.weights, held.gradients, held.optimizer] == pytest.approx(expected, rel=1e-3)


def test_zero_3_keeps_small_parameters_whole():
    big = {"hidden_size": 512, "head_dim": 64, "num_heads": 8, "num_kv_heads": 8, "intermediate_size": 1024}
    asked = config(model=big, train={"precision": "bf16"}, parallel={"dp": 2, "zero_stage": 3})
    held, sizes = memory(asked, cpu=True), [t.numel for t in tensors(asked)]
    small = sum(size for size in sizes if size <= 100_000)
    assert held.weights == sum(sizes) * 2 / 2 + small * 2
    assert held.gradients == sum(sizes) * 4 / 2
    assert held.gathered == (sum(sizes) - small) * 2


@pytest.mark.parametrize(("optim", "each"), [("sgd", 4), ("lion", 4), ("adagrad", 4), ("rmsprop", 8)])
def test_states_of_optimizers(optim, each):
    asked = config(optim={"name": optim})
    assert memory(asked, cpu=True).optimizer == each * parameters(asked.model).total


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_average_of_weights_is_one_state_more(stage):
    """Sharded as the others, and in a checkpoint as well."""

    def more(key: str, cpu: bool) -> float:
        without, kept = (
            memory(config(optim={"ema_decay": decay}, parallel={"dp": 4, "zero_stage": stage}), cpu)
            for decay in (None, 0.999)
        )
        return getattr(kept, key) - getattr(without, key)

    count = parameters(config().model).total
    assert more("optimizer", cpu=False) == pytest.approx(4 * count / (4 if stage else 1), rel=0.01)
    assert more("snapshot", cpu=True) == more("host", cpu=False) == pytest.approx(4 * count / 4, rel=0.01)


LAYERS = {
    "dense": {},
    "moe": MODELS["moe"],
    "shared expert with a gate": MODELS["moe"] | {"shared_expert_size": 24, "shared_expert_gate": True},
    "sigmoid, weights as they are": MODELS["moe"] | {"router": "sigmoid", "norm_topk_prob": False},
    "hash": MODELS["moe"] | {"router": "hash"},
    "jitter": MODELS["moe"] | {"router_jitter": 0.1},
    "capacity": MODELS["moe"] | {"capacity_factor": 1.25},
    "padded": MODELS["moe"] | {"capacity_factor": 1.25, "pad_to_capacity": True},
}


@pytest.mark.parametrize(
    ("model", "length"), [({}, 100), *((model, 32) for model in LAYERS.values())], ids=["dense, long", *LAYERS]
)
def test_activations_are_what_autograd_keeps(model, length):
    """Every tensor that the layers save for the backward pass, counted once, in fp32 on CPU."""
    asked = config(model=model, train={"micro_batch": 3, "global_batch": 3, "seq_len": length})
    module = build(asked.model)
    module.init_weights(0)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no place is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(3, length, asked.model.hidden_size, requires_grad=True)
    cos, sin = rope_tables(torch.arange(length).expand(3, length), asked.model, torch.float32)
    tables = {t.untyped_storage().data_ptr() for t in (cos, sin)}
    tokens = torch.arange(3 * length).view(3, length)
    keys = tokens if asked.model.router_jitter else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module.model.layers[0](x, Shared(cos, sin, Visibility(), tokens), keys)
    assert y.requires_grad
    total = sum(storage.nbytes() for place, storage in kept.items() if place not in tables)
    assert layer_activations(asked, asked.model.is_moe, cpu=True) == pytest.approx(total, rel=0.01)


def test_padding_is_computed_too():
    moe = MODELS["moe"] | {"capacity_factor": 2.0}
    plain, padded = (predict(config(model=moe | {"pad_to_capacity": pad}), H100) for pad in (False, True))
    # Twice the slots: as many again as 2 experts a token fill, 4 layers.
    extra = 3 * 2 * 4 * 2 * 3 * 32 * 16 * plain.tokens_per_step / (H100.flops["fp32"] * H100.attained)
    assert padded.compute_time - plain.compute_time == pytest.approx(extra)
    assert padded.memory.activations > plain.memory.activations


def test_what_a_whole_run_adds_on_a_cpu():
    held, count = memory(config(), cpu=True), parameters(config().model).total
    assert held.snapshot == 12 * count
    assert held.peak == held.needed + held.snapshot + held.trainer + held.gaps
    assert memory(config(parallel={"dp": 4}), cpu=True).snapshot == 12 * count / 4
    on_gpu = memory(config(), cpu=False)
    assert on_gpu.peak == on_gpu.needed
    assert on_gpu.host == 12 * count


def test_memory_grows_and_shrinks_as_it_should():
    def peak(**sections):
        return memory(config(**sections), cpu=False).peak

    assert peak(train={"micro_batch": 4}) > peak(train={"micro_batch": 2})
    assert peak(train={"seq_len": 512, "activation_checkpointing": "full"}) < peak(train={"seq_len": 512})
    stages = [memory(config(parallel={"dp": 4, "zero_stage": z}), cpu=True).states for z in range(4)]
    assert stages[0] > stages[1] == stages[2]  # in fp32 both hold their share when the optimizer steps
    for key in ("tp", "pp"):
        assert (
            memory(config(parallel={key: 2, "zero_stage": 1}), cpu=True).states
            < memory(config(parallel={"zero_stage": 1}), cpu=True).states
        )
    assert memory(config(train={"seq_len": 64}, parallel={"sp": 2}), True).activations < memory(
        config(train={"seq_len": 64}), True
    ).activations  # fmt: skip


def test_communication_by_hand():
    asked = config(parallel={"dp": 4})
    sent = {item.kind: item.sent for item in predict(asked, H100).traffic}
    assert sent == {"dp all-reduce": pytest.approx(2 * 3 / 4 * 4 * parameters(asked.model).total)}
    asked = config(parallel={"pp": 2, "zero_stage": 1})
    sent = {item.kind: item.sent for item in predict(asked, H100).traffic}
    assert sent == {"pp send": 2 * micro_batches(asked) * 2 * 32 * 32 * 4}
    asked = config(model=MODELS["moe"], parallel={"dp": 2, "ep": 2, "zero_stage": 1})
    sent = {item.kind: item.sent for item in predict(asked, H100).traffic}
    # half of two assignments of 64 tokens of 32 values, there and back and their gradients, 4 layers, 2 micro-batches
    assert sent["ep all-to-all"] == 64 * 2 / 2 * 32 * 4 * 4 * 4 * 2
    assert predict(config(), H100).traffic == ()


def test_bubble_and_step_time():
    asked = config(parallel={"pp": 2, "zero_stage": 1})
    plan = predict(asked, H100)
    assert plan.bubble == pytest.approx(1 / (4 + 1))
    alone = predict(config(), H100)
    expected = alone.flops_per_token * alone.tokens_per_step / (H100.flops["fp32"] * H100.attained)
    assert alone.compute_time == pytest.approx(expected)
    assert alone.step_time == pytest.approx(alone.compute_time + alone.memory_time)
    assert alone.mfu == pytest.approx(expected * H100.attained / alone.step_time)
    again = predict(config(train={"activation_checkpointing": "full"}), H100)
    assert 1.2 < again.compute_time / alone.compute_time < 4 / 3


def test_presets_are_sane():
    """Within what is published for such models: tens of GB, 20 to 60% of the peak."""
    for name, devices in {"moe-8x7b": 64, "dense-7b": 32, "moe-1b-a300m": 8}.items():
        plan = predict(preset(name), H100)
        assert plan.devices == devices
        assert plan.fits
        assert 5e9 < plan.memory.peak < 80e9
        assert 0.15 < plan.mfu < 0.6
    moe = predict(preset("moe-8x7b"), H100)
    assert moe.parameters.total == pytest.approx(46.7e9, rel=0.01)
    assert moe.parameters.active == pytest.approx(12.9e9, rel=0.01)
    assert not predict(preset("moe-8x7b", "parallel.dp=4"), H100).fits


def test_search_lists_what_fits_and_says_why_not():
    found = search(preset("dense-7b"), H100, 8)
    assert found.choices == sorted(found.choices, key=lambda choice: choice.plan.step_time)
    for choice in found.choices:
        assert choice.config.parallel.world_size == 8
        assert choice.plan.memory.peak <= 80e9 * (1 - HEADROOM)
        resolve(choice.config)  # none is refused when it is trained
    assert any(reason.startswith("pp and zero: ") for reason in found.refused)
    assert found.too_large > 0
    assert found.least > 72e9
    # At ZeRO-0 on 8 devices 16 bytes a parameter do not fit.
    assert all(choice.config.parallel.zero_stage or choice.config.parallel.sp > 1 for choice in found.choices)


def test_cpu_device_from_a_measurement():
    slow, quick = (predict(config(), cpu({"fp32": rate})) for rate in (1e9, 2e9))
    assert slow.compute_time == pytest.approx(2 * quick.compute_time)
    assert slow.fits

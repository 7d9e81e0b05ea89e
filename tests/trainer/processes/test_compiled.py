"""How often `train.compile` compiles a decoder layer: once for all layers, as it runs on a GPU.

Tracing is what is tested; the backend runs the graphs as they are.
"""

from collections.abc import Iterator
from functools import partialmethod
from itertools import product

import pytest
import tiny_models as tiny
import torch
from engines import EngineRun
from support import resolved
from torch import nn
from torch._dynamo.utils import counters

from models.decoder import attention
from models.kernels.uncompiled import leave_uncompiled
from models.moe import experts
from models.moe.balance import RouterTap
from trainer.engine.precision import WorkingCopies
from trainer.engine.start import start_processes

LAYERS = 2


@pytest.fixture(autouse=True)
def as_on_gpu(monkeypatch) -> Iterator[None]:
    """Without the hand-made kernels for CPUs, which no compiler sees."""
    leave_uncompiled()  # once, or it would undo this
    monkeypatch.setattr(experts, "_on_cpu", experts._on_gpu)
    monkeypatch.setattr(attention, "LONGEST_KERNEL", 0)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"]), "of experts in fp32 alone"
    return counters["stats"]["unique_graphs"]


def train(module: nn.Module, tap: RouterTap | None, documents: bool = False) -> None:
    """Three passes over different batches, with router states that move in between."""
    for seed in range(3):
        for chooser in tap.choosers if tap else []:
            if chooser.bias is not None:
                chooser.bias = chooser.bias + 0.1
            if chooser.global_load is not None:
                chooser.global_load = chooser.global_load + 0.1
        ids = torch.arange(24).expand(3, 24) // (7 + seed) if documents else None
        loss = module(tiny.batch(seed=seed, documents=ids)).loss_sum
        stats = tap.collect() if tap else None
        (loss + stats.aux_loss + stats.z_loss if stats else loss).backward()


CASES = {
    "dense": {"num_experts": 0},
    "softmax": {},
    "sigmoid": {"router": "sigmoid", "router_bias_rate": 0.01, "norm_topk_prob": True},
    "groups": {"router": "sigmoid", "expert_groups": 2, "top_groups": 1},
    "hash": {"router": "hash"},
    "capacity": {"capacity_factor": 1.0},
    "padded": {"capacity_factor": 1.0, "pad_to_capacity": True},
    "shared": {"shared_expert_size": 8, "shared_expert_gate": True},
    "global load": {"aux_loss_over": "global_batch"},
    "noise": {"router_jitter": 0.1, "dropout": 0.1},
}


QUICK = [("sigmoid", 1)]
BOTH_WAYS = [
    pytest.param(name, recompute, marks=[] if (name, recompute) in QUICK else pytest.mark.slow)
    for name in CASES
    for recompute in (0, 1)
]


@pytest.mark.parametrize(("case", "recompute"), BOTH_WAYS)
def test_all_layers_share_one_graph(case, recompute):
    config = tiny.config(num_layers=LAYERS, **CASES[case])
    module = tiny.model(config).train()
    WorkingCopies(module, torch.bfloat16)
    module.set_activation_checkpointing(recompute)
    tap = RouterTap(module, config) if config.is_moe else None
    for layer in module.model.layers:
        layer.compile(dynamic=False)
    train(module, tap)
    assert graphs() == 1
    module.eval()
    with torch.no_grad():
        module(tiny.batch())
    assert graphs() == 2, "evaluation keeps nothing for a backward pass"
    train(module.train(), tap)
    assert graphs() == 2


def test_documents_and_layers_of_two_kinds():
    config = tiny.config(num_layers=LAYERS + 1, first_dense_layers=2)
    module = tiny.model(config).to(torch.bfloat16).train()
    for layer in module.model.layers:
        layer.compile(dynamic=False)
    train(module, RouterTap(module, config), documents=True)
    assert graphs() == 2


def test_recomputed_routers_are_not_kept():
    module = tiny.model(tiny.config()).train()
    module.set_activation_checkpointing(1)
    tap = RouterTap(module, module.config)
    module(tiny.batch()).loss_sum.backward()
    assert [chooser.heard for chooser in tap.choosers] == [None, None]


QUICK = {(0, 0, "fp32"), (0, 4, "bf16"), (1, 4, "fp32")}
EACH = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in product([0, 1], [0, 4], ["fp32", "bf16"])
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("stage", "num_experts", "precision"), EACH)
def test_engine(stage, num_experts, precision):
    start_processes(60)
    config = resolved(
        model={"num_layers": LAYERS, "num_experts": num_experts},
        train={"micro_batch": 1, "global_batch": 2, "precision": precision, "compile": True},
        parallel={"zero_stage": stage},
    )
    EngineRun(config).steps(1, 2)
    # In fp32 the products of experts are left out, between four pieces of an MoE layer.
    assert graphs() == (4 if num_experts and precision == "fp32" else 1)

"""The compiler is mended where there is a GPU; what that does to a kernel's code is looked at on one
(benchmarks/on_gpu/operations.py)."""

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer

from models.kernels import compiler


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has compiled nothing; undone afterwards."""
    compiler.mend.cache_clear()
    monkeypatch.setattr(TritonKernel, "codegen_body", TritonKernel.codegen_body)
    yield
    compiler.mend.cache_clear()


def test_only_for_gpus(fresh, monkeypatch):
    before, reductions = TritonKernel.codegen_body, torch._inductor.config.triton.mix_order_reduction
    compiler.mend()
    assert TritonKernel.codegen_body is before
    assert torch._inductor.config.triton.mix_order_reduction == reductions


def test_on_a_gpu(fresh, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch._inductor.config.patch({"triton.mix_order_reduction": True}):
        before = TritonKernel.codegen_body
        compiler.mend()
        compiler.mend()
        assert not torch._inductor.config.triton.mix_order_reduction
    assert TritonKernel.codegen_body.__wrapped__ is before


def test_torch_still_has_what_is_mended():
    words = inspect.getsource(TritonKernel.codegen_body)
    for name in ("self.inside_reduction", "self.range_trees", "tree.is_loop", "self.stores", "self.body"):
        assert name in words


@pytest.mark.parametrize(
    ("reduction", "loop", "stores", "barriers"),
    [(True, True, True, 1), (True, True, False, 0), (True, False, True, 0), (False, True, True, 0)],
)
def test_a_barrier_after_a_loop_that_stores(reduction, loop, stores, barriers):
    def write_loop(kernel):
        kernel.body.writeline("for r0_offset in tl.range(0, r0_numel, R0_BLOCK):")
        kernel.stores.clear()

    kernel = SimpleNamespace(
        inside_reduction=reduction, range_trees=[SimpleNamespace(is_loop=loop)], body=IndentedBuffer()
    )
    kernel.stores = IndentedBuffer()
    if stores:
        kernel.stores.writeline("tl.store(out_ptr0 + r0_1, tmp1)")
    compiler.with_barriers(write_loop)(kernel)
    assert kernel.body.getvalue().split("\n")[1:].count("tl.debug_barrier()") == barriers


def test_what_a_compiled_function_compiles_is_part_of_it(monkeypatch):
    mended = []
    monkeypatch.setattr(compiler, "mend", lambda: mended.append(True))
    inner = functools.cache(lambda: compiler.compiled(torch.sin))
    whole = torch.compile(lambda x: inner()(x), backend="eager", fullgraph=True)
    x = torch.ones(3)
    assert torch.equal(whole(x), x.sin())
    assert mended == []
    compiler.compiled(torch.sin)
    assert mended == [True]

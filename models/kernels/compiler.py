"""torch's compiler, mended where the versions that muster supports (2.11 to 2.13) generate wrong code for GPUs.

Both errors give wrong gradients without a word. Private names of the compiler are used, as seen in 2.11 and 2.13.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile`, mended. In a function that is being compiled itself, which includes this one: `function`."""
    if torch.compiler.is_compiling():
        return function
    mend()
    return torch.compile(function, **options)


@functools.cache
def mend() -> None:
    """Mend the compiler in this process, if it has a GPU; call it before anything is compiled.

    - A reduction in two loops may store a value in the first and load it in the second, by another thread, with no
      barrier between: on an H200 gradients of small MoE layers were up to 800 times too large, in some processes and
      not in others, as tuning chose the threads (benchmarks/RESULTS.md; pytorch/pytorch#190519, later than 2.13).
    - Fused reductions along different dimensions may not write a part of their output (pytorch/pytorch#193061).
    """
    if not torch.cuda.is_available():
        return
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel

    config.triton.mix_order_reduction = False
    TritonKernel.codegen_body = with_barriers(TritonKernel.codegen_body)  # type: ignore[method-assign]


def with_barriers(write_loop: Callable[[Any], None]) -> Callable[[Any], None]:
    """`TritonKernel.codegen_body`, which writes one loop of a kernel, with a barrier after a loop that stores."""

    @functools.wraps(write_loop)
    def codegen_body(kernel: Any) -> None:
        stores = kernel.inside_reduction and any(tree.is_loop for tree in kernel.range_trees) and bool(kernel.stores)
        write_loop(kernel)
        if stores:
            kernel.body.writeline("tl.debug_barrier()")

    return codegen_body

"""Where a training process makes the host wait for the device: counted on a CPU, an error on a GPU."""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from each_step import before_each_step
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from models.moe import block, experts

METHODS = (
    "item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "equal",
    "allclose", "__bool__", "__int__", "__float__", "__index__", "__contains__",
)  # fmt: skip
"""Methods of a tensor that need its values on the host."""
OPERATORS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "equal", "is_nonzero", "histc",
)  # fmt: skip
"""The same below Python, and operators whose output shape depends on values."""


class Operators(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise torch would run compiled code, FlexAttention included, uncompiled

    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, HigherOrderOperator):  # FlexAttention, which never waits
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in OPERATORS and not kwargs.get("output_size")) or masks:
            self._found(name)
        return function(*args, **kwargs)


def watch_syncs(first: int, last: int, path: Path) -> None:
    """Write where this process's training thread waits from step `first` until `last` begins: {place: times}.

    Experts take the code path of accelerators. On a GPU, waiting raises.
    """
    block.apply_experts = experts.grouped_experts
    training, counted = threading.get_ident(), Counter[str]()
    methods = {name: getattr(torch.Tensor, name) for name in METHODS}
    here = str(Path(__file__).parent)

    def found(name: str) -> None:
        if threading.get_ident() != training:
            return
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(here) or "/torch/" in frame.f_code.co_filename:
            assert frame.f_back
            frame = frame.f_back
        counted["/".join(Path(frame.f_code.co_filename).parts[-2:]) + f" {frame.f_code.co_name}: {name}"] += 1

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            found(name)
            return method(*arguments, **keywords)

        return wrapped

    mode = Operators(found)

    def begin() -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        for name, method in methods.items():
            setattr(torch.Tensor, name, counting(name, method))
        mode.__enter__()

    def end() -> None:
        mode.__exit__(None, None, None)
        for name, method in methods.items():
            setattr(torch.Tensor, name, method)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        path.write_text(json.dumps(counted))

    def at_both(step: int) -> None:
        if step in (first, last):
            begin() if step == first else end()

    before_each_step(at_both)

"""Functions that a compiled layer calls without compiling them.

`torch.compiler.disable` imports the compiler, which takes a second in every process: so they are only marked, and
disabled when a layer is about to be compiled.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from .compiler import mend

Function = TypeVar("Function", bound=Callable)
_marked: list[Callable] = []


def uncompiled(function: Function) -> Function:
    """Mark a function of a module, which calls it by that name."""
    _marked.append(function)
    return function


def leave_uncompiled() -> None:
    """Exclude the marked functions from compilation, and mend the compiler; call it before the first layer is
    compiled."""
    mend()
    while _marked:
        function = _marked.pop()
        setattr(sys.modules[function.__module__], function.__name__, torch.compiler.disable(function))

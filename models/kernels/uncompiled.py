"""Functions that a compiled layer calls as they are.

`torch.compiler.disable` imports the compiler, a second in every process: so they are only marked, and given to it when
a layer is about to be compiled.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
_marked: list[Callable] = []


def uncompiled(function: Function) -> Function:
    """Mark a function of a module, which calls it by that name."""
    _marked.append(function)
    return function


def leave_uncompiled() -> None:
    """Have the compiler leave out what is marked; to be called before the first layer is compiled."""
    while _marked:
        function = _marked.pop()
        setattr(sys.modules[function.__module__], function.__name__, torch.compiler.disable(function))

"""Functions that torch.compile runs while it traces, so that a graph holds only their result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_while_tracing(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does, without importing torch's compiler with the operators."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

"""The implementations of a case that are timed against each other: the package's backends and stock PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aniso_ext import ops
from aniso_ext.bench import compositions
from aniso_ext.bench.folded import FoldedForm
from aniso_ext.bench.problems import Case, arrays_of, deltas_on, frame_of, rows_on
from aniso_ext.bench.suite import BenchCase

Function = Callable[..., torch.Tensor]
Outputs = tuple[torch.Tensor, ...]

EAGER, COMPILED, COMPILED_DIAGONAL = "eager", "compiled", "compiled diagonal"
STOCK = {
    EAGER: "stock PyTorch, step by step as the paper has it",
    COMPILED: "torch.compile of stock PyTorch with the kernels' algebra",
    COMPILED_DIAGONAL: "torch.compile of the steps with the paper's diagonal complement",
}


@dataclass(frozen=True)
class Variant:
    """A function of the inputs of a case, and the problem that it solves: `compiled diagonal` has its own."""

    name: str
    problem: Case
    function: Function
    ours: bool = False


@dataclass(frozen=True)
class Batch:
    """One set of inputs; ``cotangent`` is the gradient at the output, of a backward case alone."""

    inputs: Outputs
    cotangent: torch.Tensor | None

    @property
    def bytes(self) -> int:
        tensors = [*self.inputs, *([] if self.cotangent is None else [self.cotangent])]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def draw(case: BenchCase, rows: int, device: torch.device, seed: int) -> Batch:
    """Rows of the problem's law; states are those of the rows."""
    problem, dtype = case.problem, case.dtype
    y = rows_on(problem, rows, dtype, device, seed=seed)
    made = {"y": y}
    if "deltas" in case.inputs:
        made["deltas"] = deltas_on(problem, rows, dtype, device, seed=seed)
    if "state" in case.inputs:
        parts = [ops.encode(part, frame_of(problem), backend="reference") for part in y.split(65_536)]
        made["state"] = torch.cat(parts) if parts else y.new_empty(0, 3 * problem.blocks + problem.width)
    cotangent = None
    if case.backward:
        width = problem.width + (3 * problem.blocks if case.operation == "encode" else 0)
        generator = torch.Generator(device).manual_seed(seed + 2)
        cotangent = torch.empty(rows, width, dtype=dtype, device=device).normal_(generator=generator)
    return Batch(tuple(made[name] for name in case.inputs), cotangent)


def variants(case: BenchCase, backends: Sequence[str], device: torch.device, compile: bool) -> list[Variant]:
    """Stock first: the accuracy contract measures the others by it."""
    problem, dtype = case.problem, case.dtype
    found = [Variant(EAGER, problem, _step_by_step(case, problem, device))]
    if compile:
        folded = FoldedForm(frame_of(problem), dtype, device)
        found.append(Variant(COMPILED, problem, _compiled(_combined(case.operation, folded))))
        if case.operation == "correct" and not case.backward:
            diagonal = replace(problem, complement="diagonal")
            found.append(Variant(COMPILED_DIAGONAL, diagonal, _compiled(_step_by_step(case, diagonal, device))))
    found += [Variant(name, problem, ours(case.operation, problem, name), ours=True) for name in backends]
    return found


def ours(operation: str, problem: Case, backend: str) -> Function:
    frame = frame_of(problem)

    class Backend:
        def __getattr__(self, name: str) -> Any:
            function = getattr(ops, name)
            return lambda *rows: function(*rows, frame, backend=backend)

    return _combined(operation, Backend())


def runner(case: BenchCase, function: Function, batch: Batch) -> Callable[[], Outputs]:
    """What is timed: the forward without a graph, or the backward of a graph that was built before."""
    if not case.backward:

        def forward() -> Outputs:
            with torch.no_grad():
                return (function(*batch.inputs),)

        return forward
    leaves = tuple(value.detach().requires_grad_() for value in batch.inputs)
    output, cotangent = function(*leaves), batch.cotangent
    return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True)


def _step_by_step(case: BenchCase, problem: Case, device: torch.device) -> Function:
    frame = compositions.rounded(arrays_of(problem), case.dtype, device)

    class Steps:
        correct = staticmethod(functools.partial(compositions.correct, frame=frame, complement=problem.complement))
        correct_sums = staticmethod(
            functools.partial(compositions.correct_sums, frame=frame, complement=problem.complement)
        )
        encode = staticmethod(functools.partial(compositions.encode, frame=frame, complement=problem.complement))
        decode = staticmethod(functools.partial(compositions.decode, frame=frame))

    return _combined(case.operation, Steps())


def _combined(operation: str, implementation: Any) -> Function:
    """One function of a case's inputs; `encode_decode` is two operations."""
    if operation != "encode_decode":
        return getattr(implementation, operation)
    encode, decode = implementation.encode, implementation.decode
    return lambda y, deltas: decode(encode(y), deltas)


def _compiled(function: Function) -> Function:
    import torch._functorch.config

    # a graph whose backward is repeated must not give its buffers away
    torch._functorch.config.donated_buffer = False
    return torch.compile(lambda *inputs: function(*inputs), fullgraph=True, dynamic=False)

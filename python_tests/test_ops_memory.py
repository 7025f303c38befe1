"""Memory of the operators: results in memory that is given, and nothing that a call leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from cases import BRANCHES, Case, calibrated, frame_of, named
from devices import EVERY_BACKEND, KERNELS, Run, runs
from heap import bytes_in_use

from aniso_ext import ops
from aniso_ext.errors import InputError

CASE = calibrated(Case(30, 6, knots=9))
STRING_BYTES = 48
"""What a std::string takes on the heap: the least that a call through the C shim of torch might leave behind."""


def call_of(operator: str, run: Run) -> Callable[[], object]:
    frame, y, deltas = frame_of(CASE), run.rows(CASE, 32), run.deltas(CASE, 32)
    state, out = ops.encode(y, frame, backend="cpu"), torch.empty_like(y)
    leaf, leaves = y.clone().requires_grad_(), (state.clone().requires_grad_(), deltas.clone().requires_grad_())

    def backward(result: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        torch.autograd.grad(result.sum(), inputs)

    calls: dict[str, Callable[[], object]] = {
        "correct": lambda: ops.correct(y, frame, backend="cpu"),
        "correct out": lambda: ops.correct(y, frame, backend="cpu", out=out),
        "correct_sums": lambda: ops.correct_sums(y, frame, backend="cpu"),
        "encode": lambda: ops.encode(y, frame, backend="cpu"),
        "decode": lambda: ops.decode(state, deltas, frame, backend="cpu"),
        "correct backward": lambda: backward(ops.correct(leaf, frame, backend="cpu"), (leaf,)),
        "encode backward": lambda: backward(ops.encode(leaf, frame, backend="cpu"), (leaf,)),
        "decode backward": lambda: backward(ops.decode(*leaves, frame, backend="cpu"), leaves),
    }
    return calls[operator]


@pytest.mark.parametrize(
    "operator",
    [
        "correct",
        "correct out",
        "correct_sums",
        "encode",
        "decode",
        "correct backward",
        "encode backward",
        "decode backward",
    ],
)
@runs(["cpu"], ["float32", "bfloat16", "float64"])
def test_calls_leave_nothing_behind(operator: str, run: Run) -> None:
    call, calls = call_of(operator, run), 500
    for _ in range(20):
        call()
    gc.collect()
    before = bytes_in_use()
    for _ in range(calls):
        call()
    gc.collect()
    # below one string in every second call; single blocks that the interpreter takes meanwhile are far smaller
    assert bytes_in_use() - before < calls * STRING_BYTES / 2


@pytest.mark.parametrize("case", **named([CASE, *BRANCHES[2:5]]))
@runs(EVERY_BACKEND)
def test_memory_that_is_given_gets_the_result(case: Case, run: Run) -> None:
    frame, y = frame_of(case), run.rows(case, 70)
    expected = ops.correct(y, frame, backend=run.backend)
    room = torch.full((72, case.width), 7.0, dtype=run.dtype, device=run.device)
    assert ops.correct(y, frame, backend=run.backend, out=room[1:71]) is not None
    assert torch.equal(room[1:71], expected)
    assert bool((room[[0, 71]] == 7).all())
    nothing = ops.correct(y[:0], frame, backend=run.backend, out=room[:0])
    assert nothing.shape == (0, case.width)


@runs(KERNELS, ["float32"])
def test_memory_that_does_not_fit_is_refused(run: Run) -> None:
    frame, y = frame_of(CASE), run.rows(CASE, 8)
    for wrong in (y.new_empty(7, 30), y.new_empty(8, 31), y.double(), y.new_empty(30, 8).T, y.to("meta")):
        with pytest.raises(InputError, match="out is"):
            ops.correct(y, frame, backend=run.backend, out=wrong)
    with pytest.raises(InputError, match="no part in gradients"):
        ops.correct(y.clone().requires_grad_(), frame, backend=run.backend, out=torch.empty_like(y))


def test_the_operator_refuses_memory_that_does_not_fit() -> None:
    """It is public to torch, so that wrong memory must raise and never be written past its end."""
    from aniso_ext.ops import native

    y = torch.ones(8, 30)
    for wrong in (y.new_empty(7, 30), y.new_empty(8, 31), y.double(), y.new_empty(30, 8).T):
        with pytest.raises(RuntimeError, match="out"):
            native.correct_into(y, frame_of(CASE), wrong)

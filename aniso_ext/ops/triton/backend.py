"""The Triton kernels as operators ``aniso_ext::triton_*``, and as a backend of the public operations.

Operators take the folded constants of constants.py one by one, so that a traced graph holds them as inputs, and are
differentiable in their rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from aniso_ext.errors import InputError
from aniso_ext.ops.frame import Frame
from aniso_ext.ops.native import project_moves
from aniso_ext.ops.tracing import constant_while_tracing
from aniso_ext.ops.triton import launch
from aniso_ext.ops.triton.constants import LARGEST_RANK, Constants

NAMESPACE = "aniso_ext"
_FOLDED = (
    "Tensor project, Tensor rebuild, Tensor leak_project, Tensor leak_rebuild, Tensor per_block, Tensor per_column, "
    "Tensor scalars, Tensor table, Tensor buckets, Tensor starts, Tensor pieces, int cells, int steps, bool coarse, "
    "bool coarse_slopes, int rank, bool split, bool shifted, bool tf32"
)
_UPDATE = (
    "Tensor state, Tensor deltas, Tensor project, Tensor rebuild, Tensor per_block, Tensor per_column, Tensor scalars, "
    "int rank, bool forms, bool shifted, bool tf32, float a_theta, float a_rho, float a_v, bool project_step"
)
_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "triton_correct": (f"(Tensor y, {_FOLDED}) -> Tensor", launch.correct),
    "triton_correct_backward": (f"(Tensor grad, Tensor y, {_FOLDED}) -> Tensor", launch.correct_backward),
    "triton_correct_sums": (f"(Tensor y, {_FOLDED}) -> Tensor", launch.correct_sums),
    "triton_encode": (f"(Tensor y, {_FOLDED}) -> Tensor", launch.encode_rows),
    "triton_encode_backward": (f"(Tensor grad, Tensor y, {_FOLDED}) -> Tensor", launch.encode_backward),
    "triton_decode": (f"({_UPDATE}) -> Tensor", launch.decode_rows),
    "triton_decode_backward": (f"(Tensor grad, {_UPDATE}) -> (Tensor, Tensor)", launch.decode_backward),
}
_TENSORS = {"correct": 12, "encode": 12, "decode": 7}  # arguments of the schema that are tensors; they come first


def _like_rows(y: torch.Tensor, *constants: Any) -> torch.Tensor:
    return y.new_empty(y.shape)


def _like_second(grad: torch.Tensor, y: torch.Tensor, *constants: Any) -> torch.Tensor:
    return y.new_empty(y.shape)


def _like_sums(y: torch.Tensor, *constants: Any) -> torch.Tensor:
    return y.new_empty(y.shape[1], dtype=torch.float64)


def _like_encoded(y: torch.Tensor, *constants: Any) -> torch.Tensor:
    return y.new_empty(y.shape[0], y.shape[1] + launch.Folded(*constants).rank // 2 * 3)


def _like_decoded(state: torch.Tensor, deltas: torch.Tensor, *constants: Any) -> torch.Tensor:
    return state.new_empty(state.shape[0], state.shape[1] - launch.Update(*constants).rank // 2 * 3)


def _like_both(
    grad: torch.Tensor, state: torch.Tensor, deltas: torch.Tensor, *constants: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return state.new_empty(state.shape), deltas.new_empty(deltas.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "triton_correct": _like_rows,
    "triton_correct_backward": _like_second,
    "triton_correct_sums": _like_sums,
    "triton_encode": _like_encoded,
    "triton_encode_backward": _like_second,
    "triton_decode": _like_decoded,
    "triton_decode_backward": _like_both,
}


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError("aniso_ext kernels have no second derivatives: use backend='reference' for double backward")


def _register_gradient(name: str, rows: int) -> None:
    """The first ``rows`` arguments get gradients, from the operator of the backward."""
    tensors = _TENSORS[name]

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        operator = getattr(torch.ops.aniso_ext, f"triton_{name}_backward")
        grads = operator(grad, *ctx.saved_tensors, *ctx.options)
        grads = grads if isinstance(grads, tuple) else (grads,)
        return (*grads, *(None,) * (tensors + len(ctx.options) - rows))

    torch.library.register_autograd(f"{NAMESPACE}::triton_{name}", backward, setup_context=save)
    torch.library.register_autograd(f"{NAMESPACE}::triton_{name}_backward", _no_second_derivative)


def _register() -> None:
    # the interpreter runs on the CPU and is as good there as on a GPU
    keys = ("cuda", "cpu") if launch.INTERPRETED else ("cuda",)
    for name, (schema, function) in _OPERATORS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
        for key in keys:
            torch.library.impl(f"{NAMESPACE}::{name}", key, function)
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[name])
    _register_gradient("correct", 1)
    _register_gradient("encode", 1)
    _register_gradient("decode", 2)


_register()


def supports(dtype: torch.dtype, rank: int) -> str | None:
    """None, or why the kernels cannot serve rows of a dtype and frames of a rank."""
    if dtype == torch.float64:
        return "has no float64 kernels: use backend='reference', or float32 rows"
    if rank > LARGEST_RANK:
        return (
            f"keeps coefficients on the chip, {LARGEST_RANK} of a row at most, got rank {rank}: use backend='reference'"
        )
    return None


@constant_while_tracing
def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def constants(frame: Frame, rows: torch.Tensor) -> Constants:
    """Constants for the rows, folded on first use and kept with the frame."""
    reason = supports(rows.dtype, frame.rank)
    if reason is not None:
        raise InputError(f"backend 'triton' {reason}")
    precision = _precision() if rows.dtype == torch.float32 else "ieee"
    key = ("triton", rows.dtype, precision, str(rows.device))
    frame._prepare_triton(*key[1:])
    folded: Constants = frame._operands[key]
    return folded


def _initialisation(frame: Frame, rows: torch.Tensor, *, norms: bool) -> tuple[Any, ...]:
    """Arguments of ``correct`` and ``encode`` in schema order; without norms a scalar complement is never split."""
    c = constants(frame, rows)
    split = c.split if norms else c.diagonal
    arrays = (c.project, c.rebuild, c.leak_project, c.leak_rebuild, c.per_block, c.per_column, c.scalars)
    return (*arrays, *c.lookup, c.coarse_slopes, c.rank, split, c.shifted, c.tf32)


def correct(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    return torch.ops.aniso_ext.triton_correct(y, *_initialisation(frame, y, norms=True))


def correct_sums(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    return torch.ops.aniso_ext.triton_correct_sums(y, *_initialisation(frame, y, norms=True))


def encode(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    return torch.ops.aniso_ext.triton_encode(y, *_initialisation(frame, y, norms=False))


def decode(
    state: torch.Tensor,
    deltas: torch.Tensor,
    frame: Frame,
    *,
    a_theta: float,
    a_rho: float,
    a_v: float,
    literal: bool,
    projected: bool,
) -> torch.Tensor:
    c = constants(frame, state)
    if literal and not projected:
        deltas = project_moves(deltas, frame)
    return torch.ops.aniso_ext.triton_decode(
        state, deltas, c.project, c.rebuild, c.per_block, c.per_column, c.scalars,
        c.rank, c.forms, c.shifted, c.tf32, a_theta, a_rho, a_v, not literal,
    )  # fmt: skip


@cache
def probe() -> str | None:
    """Launch a kernel; None when it works, else the reason why the kernels cannot be used."""
    device = torch.device("cpu" if launch.INTERPRETED else "cuda")
    knots = torch.tensor([[0.5, 1.0]], dtype=torch.float64, device="cpu")
    zero = torch.zeros(16, dtype=torch.float64, device="cpu")
    basis = torch.eye(16, dtype=torch.float64, device="cpu")[:, :2]
    frame = Frame(zero, zero, basis, knots, knots, torch.ones(1, dtype=torch.float64, device="cpu"))
    try:
        rows = torch.eye(16, dtype=torch.float32, device="cpu")[:2].to(device)
        difference = float((correct(rows, frame) - rows).abs().max())
    except Exception as error:  # a compiler that is missing or broken raises whatever it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the Triton kernels do not run on this device: {reason}"
    return None if difference < 1e-3 else f"the Triton kernels compute wrongly on this device, by {difference:.1e}"

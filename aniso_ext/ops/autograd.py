"""Gradients of the operators: each backward is an operator of its own, constants of the frame get none."""

from __future__ import annotations

from typing import Any

import torch

from aniso_ext.ops import hopper
from aniso_ext.ops.schemas import NAMESPACE

_INITIALISATION_LENGTH = 9
_HOPPER_LENGTH = 5
_SCALE = _HOPPER_LENGTH + 7  # of the constants of a Hopper operator


def _save_rows_and_constants(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _correct_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_y = torch.ops.aniso_ext.correct_backward(grad, *ctx.saved_tensors)
    return grad_y, *(None,) * (_INITIALISATION_LENGTH + 1)


def _encode_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_y = torch.ops.aniso_ext.encode_backward(grad, *ctx.saved_tensors)
    return grad_y, *(None,) * _INITIALISATION_LENGTH


def _hopper_correct_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    y, *constants = ctx.saved_tensors
    if hopper.serves_gradient("correct", y.dtype, *constants[0].shape, scalar=constants[_SCALE].numel() == 1):
        grad_y = torch.ops.aniso_ext.hopper_correct_backward(grad, y, *constants)
    else:
        grad_y = torch.ops.aniso_ext.correct_backward(grad, y, *constants[_HOPPER_LENGTH:])
    return grad_y, *(None,) * (_HOPPER_LENGTH + _INITIALISATION_LENGTH + 1)


def _hopper_encode_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    y, *constants = ctx.saved_tensors
    if hopper.serves_gradient("encode", y.dtype, *constants[0].shape):
        grad_y = torch.ops.aniso_ext.hopper_encode_backward(grad, y, *constants)
    else:
        grad_y = torch.ops.aniso_ext.encode_backward(grad, y, *constants[_HOPPER_LENGTH:])
    return grad_y, *(None,) * (_HOPPER_LENGTH + _INITIALISATION_LENGTH)


def _save_update(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, a_theta, a_rho, a_v, project = inputs
    ctx.save_for_backward(*tensors)
    ctx.bounds = (a_theta, a_rho, a_v, project)


def _decode_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_state, grad_deltas = torch.ops.aniso_ext.decode_backward(grad, *ctx.saved_tensors, *ctx.bounds)
    return grad_state, grad_deltas, *(None,) * 6


def _hopper_decode_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_state, grad_deltas = torch.ops.aniso_ext.hopper_decode_backward(grad, *ctx.saved_tensors, *ctx.bounds)
    return grad_state, grad_deltas, *(None,) * 7


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError("aniso_ext kernels have no second derivatives: use backend='reference' for double backward")


for _name, _setup, _backward in (
    ("correct", _save_rows_and_constants, _correct_backward),
    ("encode", _save_rows_and_constants, _encode_backward),
    ("hopper_correct", _save_rows_and_constants, _hopper_correct_backward),
    ("hopper_encode", _save_rows_and_constants, _hopper_encode_backward),
    ("decode", _save_update, _decode_backward),
    ("hopper_decode", _save_update, _hopper_decode_backward),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup)
for _name in ("correct", "encode", "decode", "hopper_correct", "hopper_encode", "hopper_decode"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}_backward", _no_second_derivative)

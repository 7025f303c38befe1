"""Gradients of the operators: each backward is an operator of its own, constants of the frame get none."""

from __future__ import annotations

from typing import Any

import torch

from aniso_ext.ops.schemas import NAMESPACE

_INITIALISATION_LENGTH = 9


def _save_rows_and_constants(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _correct_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_y = torch.ops.aniso_ext.correct_backward(grad, *ctx.saved_tensors)
    return grad_y, *(None,) * (_INITIALISATION_LENGTH + 1)


def _encode_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_y = torch.ops.aniso_ext.encode_backward(grad, *ctx.saved_tensors)
    return grad_y, *(None,) * _INITIALISATION_LENGTH


def _save_update(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, a_theta, a_rho, a_v, project = inputs
    ctx.save_for_backward(*tensors)
    ctx.bounds = (a_theta, a_rho, a_v, project)


def _decode_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_state, grad_deltas = torch.ops.aniso_ext.decode_backward(grad, *ctx.saved_tensors, *ctx.bounds)
    return grad_state, grad_deltas, *(None,) * 6


def _no_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError("aniso_ext kernels have no second derivatives: use backend='reference' for double backward")


def _register(name: str, setup_context: Any, backward: Any) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", _no_second_derivative)


_register("correct", _save_rows_and_constants, _correct_backward)
_register("encode", _save_rows_and_constants, _encode_backward)
_register("decode", _save_update, _decode_backward)

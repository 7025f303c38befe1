"""Operator schemas, defined once for every backend, and their shape rules for tracing.

``input_weight`` to ``offset`` are the fields of :class:`aniso_ext.ops.operands.Operands`. The Hopper operators read
those of :class:`aniso_ext.ops.hopper.HopperOperands` before them, or a shuffled basis; gradients of the former are
those of the operators without the prefix.
"""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "aniso_ext"

_INITIALISATION = (
    "Tensor input_weight, Tensor input_bias, Tensor target_coordinates, Tensor segments, "
    "Tensor buckets, Tensor windows, Tensor output_weight, Tensor scale, Tensor offset"
)
_HOPPER = "Tensor basis, Tensor shuffled, Tensor coordinates, Tensor cells, Tensor map_scales"
_UPDATE = (
    "Tensor state, Tensor deltas, Tensor basis, Tensor? shift, float a_theta, float a_rho, float a_v, bool project"
)
_HOPPER_UPDATE = _UPDATE.replace("Tensor basis", "Tensor shuffled, Tensor basis")

SCHEMAS = {
    "correct": f"(Tensor y, {_INITIALISATION}, Tensor? shift) -> Tensor",
    "correct_into": f"(Tensor y, {_INITIALISATION}, Tensor? shift, Tensor(a!) out) -> ()",
    "correct_sums": f"(Tensor y, {_INITIALISATION}) -> Tensor",
    "correct_backward": f"(Tensor grad, Tensor y, {_INITIALISATION}, Tensor? shift) -> Tensor",
    "encode": f"(Tensor y, {_INITIALISATION}) -> Tensor",
    "encode_backward": f"(Tensor grad, Tensor y, {_INITIALISATION}) -> Tensor",
    "hopper_correct": f"(Tensor y, {_HOPPER}, {_INITIALISATION}, Tensor? shift) -> Tensor",
    "hopper_correct_sums": f"(Tensor y, {_HOPPER}, {_INITIALISATION}) -> Tensor",
    "hopper_encode": f"(Tensor y, {_HOPPER}, {_INITIALISATION}) -> Tensor",
    "hopper_decode": f"({_HOPPER_UPDATE}) -> Tensor",
    "hopper_decode_backward": f"(Tensor grad, {_HOPPER_UPDATE}) -> (Tensor, Tensor)",
    "decode": f"({_UPDATE}) -> Tensor",
    "decode_backward": f"(Tensor grad, {_UPDATE}) -> (Tensor, Tensor)",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)


@torch.library.register_fake(f"{NAMESPACE}::correct")
@torch.library.register_fake(f"{NAMESPACE}::hopper_correct")
def _(y: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


@torch.library.register_fake(f"{NAMESPACE}::correct_into")
def _(y: torch.Tensor, *operands: torch.Tensor) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::correct_sums")
@torch.library.register_fake(f"{NAMESPACE}::hopper_correct_sums")
def _(y: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape[1], dtype=torch.float64)


@torch.library.register_fake(f"{NAMESPACE}::correct_backward")
def _(grad: torch.Tensor, y: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


@torch.library.register_fake(f"{NAMESPACE}::encode")
def _(
    y: torch.Tensor,
    input_weight: torch.Tensor,
    input_bias: torch.Tensor,
    target_coordinates: torch.Tensor,
    *operands: torch.Tensor,
) -> torch.Tensor:
    return y.new_empty((y.shape[0], y.shape[1] + target_coordinates.shape[0] // 2 * 3))


@torch.library.register_fake(f"{NAMESPACE}::hopper_encode")
def _(y: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    target_coordinates = operands[7]
    return y.new_empty((y.shape[0], y.shape[1] + target_coordinates.shape[0] // 2 * 3))


@torch.library.register_fake(f"{NAMESPACE}::encode_backward")
def _(grad: torch.Tensor, y: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


@torch.library.register_fake(f"{NAMESPACE}::decode")
def _(state: torch.Tensor, deltas: torch.Tensor, basis: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return state.new_empty((state.shape[0], basis.shape[0]))


@torch.library.register_fake(f"{NAMESPACE}::hopper_decode")
def _(
    state: torch.Tensor, deltas: torch.Tensor, shuffled: torch.Tensor, basis: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    return state.new_empty((state.shape[0], basis.shape[0]))


@torch.library.register_fake(f"{NAMESPACE}::decode_backward")
@torch.library.register_fake(f"{NAMESPACE}::hopper_decode_backward")
def _(
    grad: torch.Tensor, state: torch.Tensor, deltas: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return state.new_empty(state.shape), deltas.new_empty(deltas.shape)

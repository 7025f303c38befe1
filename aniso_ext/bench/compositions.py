"""The operations composed from PyTorch calls, each step in the dtype of the rows, sharing nothing with the package.

This is what a user without the package would write for one dtype: the frame rounded to it, angles by atan2, the
radius map by searchsorted, every complement by its products. Rows, products and sums all have that dtype. It is the
measure of the accuracy contract, and the stock PyTorch that the kernels are timed against. A frame here is a mapping of
tensors by the names of the artefact; :func:`rounded` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]


def rounded(
    arrays: Mapping[str, np.ndarray], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Float64 arrays as tensors of one dtype on a device."""
    return {name: torch.tensor(value).to(device=device, dtype=dtype).contiguous() for name, value in arrays.items()}


def correct(y: torch.Tensor, frame: Tensors, complement: str, center: bool = False) -> torch.Tensor:
    rho, theta, v0 = _initialise(y, frame, complement, center)
    return _rebuild(rho * theta.cos(), rho * theta.sin(), v0, frame)


def correct_sums(y: torch.Tensor, frame: Tensors, complement: str, center: bool = False) -> torch.Tensor:
    uncalibrated = {name: value for name, value in frame.items() if name != "output_mean"}
    working = torch.float64 if y.dtype == torch.float64 else torch.float32
    return correct(y, uncalibrated, complement, center).sum(dim=0, dtype=working)


def encode(y: torch.Tensor, frame: Tensors, complement: str, center: bool = False) -> torch.Tensor:
    rho, theta, v0 = _initialise(y, frame, complement, center)
    return torch.cat((theta.sin(), theta.cos(), rho.log(), v0), dim=1)


def decode(state: torch.Tensor, deltas: torch.Tensor, frame: Tensors, *, literal: bool = False) -> torch.Tensor:
    basis = frame["basis"]
    width, rank = basis.shape
    sin, cos, log_rho, v0 = state.split((rank // 2, rank // 2, rank // 2, width), dim=1)
    turn, stretch, move = deltas.split((rank // 2, rank // 2, width), dim=1)
    angle = 0.1 * turn.tanh()
    rho = torch.exp(log_rho + 0.1 * stretch.tanh())
    a_v = 0.1 / math.sqrt(width)
    if literal:
        step = a_v * (move - move @ basis @ basis.T).tanh()
    else:
        step = a_v * move.tanh()
        step = step - step @ basis @ basis.T
    a = rho * (cos * angle.cos() - sin * angle.sin())
    b = rho * (sin * angle.cos() + cos * angle.sin())
    return _rebuild(a, b, v0 + step, frame)


def _radius_map(radius: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    piece = torch.searchsorted(source, radius.detach().T.contiguous(), right=True).T
    lower = (piece - 1).clamp(0, source.shape[1] - 2)
    block = torch.arange(radius.shape[1], device=radius.device)
    s0, s1, t0, t1 = source[block, lower], source[block, lower + 1], target[block, lower], target[block, lower + 1]
    # neighbouring knots can coincide in half precision
    width = torch.where(s1 > s0, s1 - s0, torch.ones_like(s0))
    inside = t0 + (radius - s0) / width * (t1 - t0)
    below = radius * (target[:, 0] / source[:, 0])
    above = radius * (target[:, -1] / source[:, -1])
    return torch.where(piece == 0, below, torch.where(piece == source.shape[1], above, inside))


def _initialise(
    y: torch.Tensor, frame: Tensors, complement: str, center: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    basis = frame["basis"]
    centred = y - frame["source_mean"]
    coordinates = (centred if center else centred + frame["target_mean"]) @ basis
    a, b = coordinates[:, 0::2], coordinates[:, 1::2]
    theta = torch.atan2(b, a)
    rho = torch.sqrt(a * a + b * b + 1e-12)
    rho0 = _radius_map(rho, frame["radius_source_knots"], frame["radius_target_knots"])
    v0 = frame["complement_scale"] * (centred - centred @ basis @ basis.T)
    if complement == "diagonal_projected":
        v0 = v0 - v0 @ basis @ basis.T
    target = frame["target_mean"]
    return rho0, theta, v0 + (target if center else target - target @ basis @ basis.T)


def _rebuild(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor, frame: Tensors) -> torch.Tensor:
    rows = torch.nn.functional.normalize(torch.stack((a, b), dim=-1).flatten(1) @ frame["basis"].T + v, eps=1e-7)
    if "output_mean" in frame:
        rows = torch.nn.functional.normalize(rows - frame["output_mean"] + frame["target_mean"], eps=1e-7)
    return rows

"""The closed-form correction in NumPy float64, straight from METHOD sections 2 and 4, sharing nothing with the package.

Angles are arctan2, maps are written knot by knot, and the complement is the explicit matrix I - Q Q^T. ``frame`` is a
mapping of float64 arrays by the names of the artefact. Slow, and meant to be.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

EPS = 1e-12
Arrays = Mapping[str, np.ndarray]


def radius_map(radius: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """T_k for one block: radius [N], knots [K]."""
    mapped = np.interp(radius, source, target)
    mapped = np.where(radius < source[0], radius * target[0] / source[0], mapped)
    return np.where(radius >= source[-1], radius * target[-1] / source[-1], mapped)


def initialise(
    y: np.ndarray, frame: Arrays, complement: str, center: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rho0 [N, M], theta0 [N, M], v0 [N, D])."""
    y = np.asarray(y, dtype=np.float64)
    basis, width = frame["basis"], frame["basis"].shape[0]
    outside = np.eye(width) - basis @ basis.T
    target = frame["target_mean"]
    coordinates = (y - frame["source_mean"] + (0 if center else target)) @ basis
    a, b = coordinates[:, 0::2], coordinates[:, 1::2]
    theta = np.arctan2(b, a)
    rho = np.sqrt(a**2 + b**2 + EPS)
    mapped = np.stack(
        [
            radius_map(rho[:, k], frame["radius_source_knots"][k], frame["radius_target_knots"][k])
            for k in range(rho.shape[1])
        ],
        axis=1,
    )
    v0 = ((y - frame["source_mean"]) @ outside.T) * frame["complement_scale"]
    if complement == "diagonal_projected":
        v0 = v0 @ outside.T
    return mapped, theta, v0 + (target if center else outside @ target)


def rebuild(rho: np.ndarray, theta: np.ndarray, v: np.ndarray, frame: Arrays) -> np.ndarray:
    """Norm(Q c(rho, theta) + v), calibrated when the frame holds an output mean."""
    coordinates = np.empty((len(rho), 2 * rho.shape[1]))
    coordinates[:, 0::2], coordinates[:, 1::2] = rho * np.cos(theta), rho * np.sin(theta)
    rows = unit(coordinates @ frame["basis"].T + v)
    if "output_mean" in frame:
        rows = unit(rows - frame["output_mean"] + frame["target_mean"])
    return rows


def correct(y: np.ndarray, frame: Arrays, complement: str, center: bool = False) -> np.ndarray:
    return rebuild(*initialise(y, frame, complement, center), frame)


def encode(y: np.ndarray, frame: Arrays, complement: str, center: bool = False) -> np.ndarray:
    rho, theta, v0 = initialise(y, frame, complement, center)
    return np.concatenate((np.sin(theta), np.cos(theta), np.log(rho), v0), axis=1)


def decode(
    state: np.ndarray,
    deltas: np.ndarray,
    frame: Arrays,
    *,
    a_theta: float = 0.1,
    a_rho: float = 0.1,
    a_v: float | None = None,
    literal: bool = False,
) -> np.ndarray:
    """Rows [N, D] from states that are directions of unit length and deltas."""
    state, deltas = np.asarray(state, dtype=np.float64), np.asarray(deltas, dtype=np.float64)
    basis = frame["basis"]
    width, rank = basis.shape
    blocks = rank // 2
    a_v = 0.1 / np.sqrt(width) if a_v is None else a_v
    outside = np.eye(width) - basis @ basis.T
    sin, cos, log_rho, v0 = np.split(state, (blocks, 2 * blocks, 3 * blocks), axis=1)
    turn, stretch, move = np.split(deltas, (blocks, rank), axis=1)
    # rounded directions are not exactly of unit length, and the length is part of what is given
    length = np.hypot(sin, cos)
    theta = np.arctan2(sin, cos) + a_theta * np.tanh(turn)
    rho = length * np.exp(log_rho + a_rho * np.tanh(stretch))
    step = a_v * np.tanh(move @ outside.T) if literal else (a_v * np.tanh(move)) @ outside.T
    return rebuild(rho, theta, v0 + step, frame)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), EPS)

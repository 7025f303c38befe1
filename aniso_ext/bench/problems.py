"""Frames and rows that tests and benchmarks share: seeded, synthetic, and shaped like fitted ones.

A case names a width D, a rank R, the knots K of the radius maps, a complement and whether the frame is calibrated.
Arrays are NumPy float64, so that an oracle can read them without the package; :func:`frame_of` wraps them for it.
:func:`rows_on` and :func:`deltas_on` draw from the same laws on a device, a million rows in well under a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from aniso_ext.ops import Frame

COMPLEMENTS = ("scalar", "diagonal", "diagonal_projected")
_DRAWN_AT_ONCE = 65_536


@dataclass(frozen=True)
class Case:
    """One shape of the problem; equal cases give equal arrays."""

    width: int
    rank: int
    knots: int = 64
    complement: str = "scalar"
    calibrated: bool = False
    seed: int = 0
    center: bool = False  # METHOD D4
    sampled: bool = False  # knots from samples, as a fit has them, instead of a smooth distribution
    basis_dtype: str = "float64"  # the format that the basis is orthonormal to: "float64" or "bfloat16"

    def __str__(self) -> str:
        calibrated = "-calibrated" if self.calibrated else ""
        center = "-centred" if self.center else ""
        sampled = "-sampled" if self.sampled else ""
        basis = "-bf16basis" if self.basis_dtype == "bfloat16" else ""
        return f"D{self.width}-R{self.rank}-K{self.knots}-{self.complement}{calibrated}{center}{sampled}{basis}"

    @property
    def blocks(self) -> int:
        return self.rank // 2


# Every branch of the operators at a width that is no multiple of 8 and a rank that is no multiple of a vector.
BRANCHES = tuple(
    Case(70, 22, complement=complement, calibrated=calibrated)
    for complement in COMPLEMENTS
    for calibrated in (False, True)
)
# The shapes of real encoders; the first is the one that most benchmarks quote.
ENCODERS = (
    Case(1280, 128, knots=1024),
    Case(768, 128, knots=1024),
    Case(768, 256, knots=1024),
    Case(512, 128, knots=1024),
)


def named(cases: Sequence[Case]) -> dict[str, object]:
    """Keyword arguments for ``pytest.mark.parametrize("case", ...)``."""
    return {"argvalues": cases, "ids": [str(case) for case in cases]}


def calibrated(case: Case) -> Case:
    return replace(case, calibrated=True)


def _directions(case: Case) -> np.ndarray:
    """An orthonormal basis of the whole space; its first R columns span U."""
    return _orthonormal(case.seed, case.width)


@cache
def _orthonormal(seed: int, width: int) -> np.ndarray:
    random = np.random.default_rng([seed, width, 1])
    basis = np.linalg.qr(random.standard_normal((width, width)))[0]
    basis.setflags(write=False)
    return basis


def _deviations(case: Case) -> np.ndarray:
    """Standard deviations along the directions: a power law, total variance about that of unit rows."""
    variances = np.arange(1, case.width + 1) ** -0.9
    return np.sqrt(0.7 * variances / variances.sum())


def _knots(case: Case, mean_square: np.ndarray, shape: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Quantiles [M, K] of Weibull radii with a given mean square, dense in the tails; uneven where they are sampled."""
    second_moment = np.array([math.gamma(1 + 2 / s) for s in shape])
    scale = np.sqrt(mean_square / second_moment)
    levels = np.sin(0.5 * np.pi * np.arange(case.knots) / (case.knots - 1)) ** 2
    if case.sampled:
        samples = scale[:, None] * random.weibull(shape[:, None], (len(shape), 20_000))
        return np.quantile(samples, levels, axis=1).T
    levels = 1e-3 + (1 - 2e-3) * levels
    return scale[:, None] * (-np.log1p(-levels)) ** (1 / shape[:, None])


@cache
def arrays_of(case: Case) -> dict[str, np.ndarray]:
    """The arrays of a frame in float64, read-only, by the names of ``Frame``; ``output_mean`` only when calibrated."""
    random = np.random.default_rng([case.seed, case.width, case.rank, 2])
    directions, deviations = _directions(case), _deviations(case)
    source_mean = 0.5 * _unit(random, case.width)
    target_mean = source_mean + 0.4 * _unit(random, case.width)
    basis = directions[:, : case.rank]
    if case.basis_dtype == "bfloat16":
        basis = torch.from_numpy(basis.copy()).bfloat16().double().numpy()
    offset = np.zeros(case.rank) if case.center else target_mean @ basis
    energies = (deviations[: case.rank] ** 2 + offset**2).reshape(-1, 2).sum(axis=1)
    arrays = {
        "source_mean": source_mean,
        "target_mean": target_mean,
        "basis": basis,
        "radius_source_knots": _knots(case, energies, random.uniform(1.7, 2.3, case.blocks), random),
        "radius_target_knots": _knots(
            case, energies * random.uniform(0.6, 1.5, case.blocks), random.uniform(1.5, 2.5, case.blocks), random
        ),
        "complement_scale": np.array([0.87])
        if case.complement == "scalar"
        else np.clip(np.exp(0.25 * random.standard_normal(case.width)), 0.25, 4.0),
    }
    if case.calibrated:
        arrays["output_mean"] = target_mean + 0.1 * _unit(random, case.width)
    for value in arrays.values():
        value.setflags(write=False)
    return arrays


@cache
def frame_of(case: Case, dtype: torch.dtype = torch.float64) -> Frame:
    """The frame of a case; made once, as its users share the constants that it keeps."""
    tensors = {name: torch.tensor(value) for name, value in arrays_of(case).items()}
    return Frame.from_tensors(tensors, complement=case.complement, center=case.center).to(dtype=dtype)


def rows_of(case: Case, rows: int, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> torch.Tensor:
    """Unit source embeddings [N, D], anisotropic around the source mean of the case."""
    random = np.random.default_rng([case.seed, case.width, seed, 3])
    coordinates = random.standard_normal((rows, case.width)) * _deviations(case)
    y = arrays_of(case)["source_mean"] + coordinates @ _directions(case).T
    return torch.from_numpy(y / np.linalg.norm(y, axis=1, keepdims=True)).to(dtype)


def rows_on(case: Case, rows: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> torch.Tensor:
    """The law of :func:`rows_of`, drawn on the device in float32, a part of the rows at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    mixing = torch.from_numpy(_deviations(case)[:, None] * _directions(case).T).to(device, torch.float32)
    mean = torch.from_numpy(arrays_of(case)["source_mean"].copy()).to(device, torch.float32)
    y = torch.empty(rows, case.width, dtype=dtype, device=device)
    for part in y.split(_DRAWN_AT_ONCE):
        coordinates = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(torch.nn.functional.normalize(coordinates @ mixing + mean))
    return y


def deltas_on(case: Case, rows: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> torch.Tensor:
    """The law of :func:`deltas_of`, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    deltas = torch.empty(rows, case.rank + case.width, dtype=dtype, device=device)
    for part in deltas.split(_DRAWN_AT_ONCE):
        part.copy_(1.5 * torch.randn(part.shape, generator=generator, device=device))
    return deltas


def deltas_of(case: Case, rows: int, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> torch.Tensor:
    """Refiner outputs [N, 2M + D] that reach from the linear part of tanh into its ends."""
    random = np.random.default_rng([case.seed, case.width, seed, 4])
    return torch.from_numpy(1.5 * random.standard_normal((rows, case.rank + case.width))).to(dtype)


def _unit(random: np.random.Generator, width: int) -> np.ndarray:
    vector = random.standard_normal(width)
    return vector / np.linalg.norm(vector)

"""Small random frames, rows and refiners for the tests of Stage II."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from aniso_ext import ops
from aniso_ext.align.refiner import Bounds, Refiner

WIDTH, BLOCKS, KNOTS = 20, 4, 16
RANK = 2 * BLOCKS
ORDERS = pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])


def frame_of(seed: int, complement: str = "scalar", center: bool = False, calibrated: bool = False) -> ops.Frame:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0]
    arrays = {
        "source_mean": 0.2 * rng.standard_normal(WIDTH),
        "target_mean": 0.2 * rng.standard_normal(WIDTH),
        "basis": basis,
        "radius_source_knots": np.sort(rng.uniform(0.05, 1, (BLOCKS, KNOTS))),
        "radius_target_knots": np.sort(rng.uniform(0.05, 1, (BLOCKS, KNOTS))),
        "complement_scale": rng.uniform(0.5, 1.5, 1 if complement == "scalar" else WIDTH),
    }
    if calibrated:
        arrays["output_mean"] = 0.1 * rng.standard_normal(WIDTH)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return ops.Frame.from_tensors(tensors, complement=complement, center=center)


def rows_of(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(oracle.unit(np.random.default_rng(seed).standard_normal((count, WIDTH)) + 0.3))


def wild_refiner(seed: int, scale: float, bounds: Bounds, literal: bool) -> Refiner:
    """A refiner of float64 with random weights of any size: its deltas are anything from tiny to saturated."""
    refiner = Refiner(BLOCKS, WIDTH, bounds=bounds, literal=literal, hidden=24, layers=2, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in refiner.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        refiner.input_mean.normal_(generator=generator)
        refiner.input_std.uniform_(0.1, 3, generator=generator)
    return refiner

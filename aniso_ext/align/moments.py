"""First and second moments of both sides as float64 tensors, in one pass over each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from aniso_ext.align.rows import UNIT_TOLERANCE, Rows
from aniso_ext.errors import InputError
from aniso_ext.stats import Moments
from aniso_ext.stats.device_moments import DeviceMoments


@dataclass(frozen=True)
class SideMoments:
    """Mean [D], per-column standard deviation [D], trace and, if asked for, covariance [D, D] of one side."""

    mean: torch.Tensor
    std: torch.Tensor
    trace: float
    _covariance: torch.Tensor | None

    @property
    def covariance(self) -> torch.Tensor:
        if self._covariance is None:
            raise AttributeError("only the diagonal of this covariance was kept")
        return self._covariance


def _moments(rows: Rows, diagonal: bool, device: torch.device) -> Moments:
    """Moments of this process's share; products on ``device``."""
    found = Moments(rows.width, diagonal=diagonal) if device.type == "cpu" else DeviceMoments(rows.width, device)
    seen = rows.share[0]
    for batch in rows.exact_batches(device):
        check_values(batch, rows.name, seen)
        if isinstance(found, Moments):
            found.update(batch.numpy())
        else:
            found.update(batch)
        seen += len(batch)
    return found.moments() if isinstance(found, DeviceMoments) else found


def _side(rows: Rows, diagonal: bool, device: torch.device) -> SideMoments:
    with rows.together():  # the first pass over all rows, where bad ones and unreadable files are found
        found = _moments(rows, diagonal, device)
    moments = rows.merged(found)
    return SideMoments(
        mean=torch.from_numpy(moments.mean),
        std=torch.from_numpy(moments.std),
        trace=float(moments.trace),
        _covariance=None if diagonal else torch.from_numpy(moments.covariance),
    )


def _both(
    source: Rows, target: Rows, diagonal: bool, device: torch.device
) -> tuple[SideMoments, SideMoments, dict[str, Any]]:
    sides = _side(source, diagonal, device), _side(target, diagonal, device)
    return *sides, {"centroid_gap": float((sides[0].mean - sides[1].mean).norm())}


def first_moments(source: Rows, target: Rows) -> tuple[SideMoments, SideMoments, dict[str, Any]]:
    """Means and variances of both sides, and the summary entry |m_s - m_t|; memory O(D)."""
    return _both(source, target, diagonal=True, device=torch.device("cpu"))


def full_moments(
    source: Rows, target: Rows, device: torch.device | str | None = None
) -> tuple[SideMoments, SideMoments, dict[str, Any]]:
    """Means and covariances of both sides, and the summary entry |m_s - m_t|; memory O(D^2), products on ``device``."""
    return _both(source, target, diagonal=False, device=torch.device("cpu" if device is None else device))


def check_values(batch: torch.Tensor, name: str, first_row: int) -> None:
    """Refuse non-finite rows and warn about rows that are not unit vectors: the method is defined on the sphere."""
    norms = batch.norm(dim=1)
    bad = (~torch.isfinite(norms)).nonzero().flatten()
    if len(bad):
        raise InputError(
            f"{name} has {len(bad)} non-finite rows among rows {first_row} to {first_row + len(batch) - 1}, "
            f"the first is row {first_row + int(bad[0])}: drop or repair them before fitting"
        )
    if first_row == 0 and float((norms - 1).abs().max()) > UNIT_TOLERANCE:
        warnings.warn(
            f"{name} rows are not unit vectors (norms {float(norms.min()):.4g} to {float(norms.max()):.4g}): "
            "L2-normalise them first, the method is defined on the unit sphere",
            stacklevel=2,
        )

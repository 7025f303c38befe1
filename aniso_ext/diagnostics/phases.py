"""Phases and radii of the clouds in the blocks of a frame (METHOD sections 2 to 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aniso_ext.diagnostics.clouds import SOURCE, TARGET, batches, open_clouds, sample
from aniso_ext.diagnostics.report import Report, emit, format_number
from aniso_ext.diagnostics.rows import Rows
from aniso_ext.errors import InputError
from aniso_ext.ops import Frame
from aniso_ext.ops.reference import polar
from aniso_ext.stats import PhaseMoments

BINS = 64
COUPLED = 32
MAPS = 4
MAP_KNOTS = 128
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class PhaseCloud:
    """Phases of one cloud: shares of the bins, |E e^{i theta_k}| and |M_kl|, in the order of the report's blocks."""

    histograms: tuple[tuple[float, ...], ...]
    concentration: tuple[float, ...]
    coupling: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RadiusMap:
    """T_k of one block: target radii at source radii, knots of the frame."""

    block: int
    source: tuple[float, ...]
    target: tuple[float, ...]


@dataclass(frozen=True)
class PhaseReport(Report):
    """Phases of ``n`` rows of each cloud in a frame; see :func:`phase_report`."""

    n: int
    n_available: int
    width: int
    rank: int
    blocks: tuple[int, ...]
    coupled_blocks: tuple[int, ...]
    energy: tuple[float, ...]
    bin_edges: tuple[float, ...]
    coupling_threshold: float
    clouds: dict[str, PhaseCloud]
    radius_maps: tuple[RadiusMap, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        wide = max(map(len, self.clouds))
        lines = [
            f"phases of {self.n} rows in {self.rank // 2} blocks; |E e^(i theta)| of the leading ones:",
            f"  {'block':<{wide}}" + "".join(f"{block:>9}" for block in self.blocks),
        ]
        for name, cloud in self.clouds.items():
            shown = cloud.concentration[: len(self.blocks)]
            lines.append(f"  {name:<{wide}}" + "".join(f"{format_number(value):>9}" for value in shown))
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


def phase_report(
    source: Any,
    target: Any,
    stand_ins: Mapping[str, Any],
    frame: Frame,
    *,
    max_rows: int | None = 20_000,
    seed: int = 0,
    blocks: int = 8,
) -> PhaseReport:
    """Compare phases of target, recentred source and stand-ins in the blocks of a frame (METHOD sections 2 and 3).

    With Q the basis of the frame, block k is coordinates 2k and 2k+1 of Q^T x, Q^T (y - m_s + m_t) and Q^T z; a
    centred frame takes m_t off all three. In each block theta_k is the angle::

        histograms: share of the rows in 64 equal bins of [-pi, pi]        concentration = |E e^{i theta_k}|
        coupling = |M_kl|, M_kl = E e^{i (theta_k - theta_l)}
        coupling_threshold = sqrt(ln(M^2 / 0.02) / n): what unrelated phases exceed in a pair of blocks with 1 % (D5)

    ``blocks`` are numbers of blocks of the frame, those with the largest mean squared target radius first; ``energy``
    is their share of that of all blocks, ``coupled_blocks`` are up to 32 of the same order, for concentration, coupling
    and energy. ``radius_maps`` holds at most 128 knots of each of the first four.

    Args:
        source, target: [N, D] arrays or tensors, opened embedding sets, or paths; row i of both belongs to pair i.
        stand_ins: stand-ins [N, D] of the source by the name of their method; may be empty.
        frame: of a fitted aligner (``aligner.frame_``).
        max_rows: above this many rows, a uniform sample drawn with ``seed`` is taken; None takes all.
        seed: of the sample.
        blocks: histograms of so many blocks.

    Raises:
        InputError: rows, widths or options do not fit, or a non-finite row.

    Warns:
        DiagnosticsWarning: rows whose phase is undefined, because a block is zero; they are counted at angle 0.

    Example:
        >>> import numpy as np, torch
        >>> knots = torch.linspace(0.1, 1.0, 8).repeat(1, 1)
        >>> frame = Frame(torch.zeros(4), torch.zeros(4), torch.eye(4)[:, :2], knots, knots, torch.ones(1))
        >>> rows = np.tile([[0.0, 1.0, 0.0, 0.0]], (10, 1))
        >>> report = phase_report(-rows, rows, {"flipped": rows}, frame)
        >>> round(report.clouds["target"].concentration[0], 6), report.clouds["source"].histograms[0].index(1.0)
        (1.0, 16)
    """
    if blocks < 1:
        raise InputError(f"blocks must be at least 1, got {blocks}")
    opened = open_clouds(source, target, stand_ins, minimum=1)
    rows = opened[TARGET]
    if rows.width != frame.width:
        raise InputError(
            f"the rows have width {rows.width} but the frame has width {frame.width}: pass the frame of an aligner "
            "that was fitted in this embedding space"
        )
    chosen = sample(rows.count, max_rows, seed)
    frame = frame.to("cpu", torch.float64)
    energy = _block_energy(rows, chosen, frame)
    order = np.argsort(-energy, kind="stable")
    leading, coupled = order[:blocks], order[: max(COUPLED, blocks)]
    measured = {
        name: _measure(opened[name], chosen, frame, _offset(name, frame), leading, coupled)
        for name in (TARGET, SOURCE, *stand_ins)
    }
    total = float(energy.sum())
    warnings = tuple(
        f"{name} has {zeros} phases in blocks that are zero: they are counted at angle 0"
        for name, (_, zeros) in measured.items()
        if zeros
    )
    emit(warnings)
    return PhaseReport(
        n=len(chosen),
        n_available=rows.count,
        width=frame.width,
        rank=frame.rank,
        blocks=tuple(leading.tolist()),
        coupled_blocks=tuple(coupled.tolist()),
        energy=tuple(float(energy[block]) / total if total > 0 else math.nan for block in coupled),
        bin_edges=tuple(np.linspace(-math.pi, math.pi, BINS + 1).tolist()),
        coupling_threshold=math.sqrt(math.log(frame.blocks**2 / (2 * SIGNIFICANCE)) / len(chosen)),
        clouds={name: cloud for name, (cloud, _) in measured.items()},
        radius_maps=tuple(_radius_map(frame, int(block)) for block in leading[:MAPS]),
        warnings=warnings,
    )


def _offset(name: str, frame: Frame) -> torch.Tensor:
    """What is taken off the rows of a cloud before their coordinates are (METHOD D4)."""
    if name == SOURCE:
        return frame.source_mean if frame.center else frame.source_mean - frame.target_mean
    return frame.target_mean if frame.center else torch.zeros_like(frame.target_mean)


def _block_energy(rows: Rows, chosen: np.ndarray, frame: Frame) -> np.ndarray:
    """E rho_k^2 of the target [M]."""
    offset, total = _offset(TARGET, frame), np.zeros(frame.blocks)
    for batch in batches(rows, chosen):
        squares = ((batch - offset) @ frame.basis).square()
        total += (squares[:, 0::2] + squares[:, 1::2]).sum(dim=0).numpy()
    return total / len(chosen)


def _measure(
    rows: Rows, chosen: np.ndarray, frame: Frame, offset: torch.Tensor, leading: np.ndarray, coupled: np.ndarray
) -> tuple[PhaseCloud, int]:
    """Histograms and moments of one cloud in one pass, and how many phases have no radius."""
    counts = np.zeros((len(leading), BINS), dtype=np.int64)
    moments, zeros = PhaseMoments(len(coupled)), 0
    columns = torch.from_numpy(np.stack((2 * coupled, 2 * coupled + 1), axis=1).reshape(-1))
    basis = frame.basis[:, columns]
    for batch in batches(rows, chosen):
        coordinates = (batch - offset) @ basis
        _, cos, sin = polar(coordinates)
        zeros += int(((coordinates[:, 0::2] == 0) & (coordinates[:, 1::2] == 0)).sum())
        moments.update((cos.numpy(), sin.numpy()))
        theta = torch.atan2(sin, cos).numpy()
        for place in range(len(leading)):
            counts[place] += np.histogram(theta[:, place], bins=BINS, range=(-math.pi, math.pi))[0]
    small = min(COUPLED, len(coupled))
    return PhaseCloud(
        histograms=tuple(tuple(row) for row in (counts / len(chosen)).tolist()),
        concentration=tuple(np.abs(moments.first).tolist()),
        coupling=tuple(tuple(row) for row in np.abs(moments.second[:small, :small]).tolist()),
    ), zeros


def _radius_map(frame: Frame, block: int) -> RadiusMap:
    picked = np.unique(np.linspace(0, frame.knots - 1, min(MAP_KNOTS, frame.knots)).round().astype(int))
    source, target = (knots[block].numpy()[picked] for knots in (frame.radius_source_knots, frame.radius_target_knots))
    return RadiusMap(block, tuple(source.tolist()), tuple(target.tolist()))

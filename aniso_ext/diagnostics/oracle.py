"""The paired oracle: how much each share of the residual's leading directions is worth (METHOD section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aniso_ext.diagnostics import spectra
from aniso_ext.diagnostics.alignment import AlignmentReport, measure
from aniso_ext.diagnostics.alignment_intervals import Settings
from aniso_ext.diagnostics.neighbours import unit_rows
from aniso_ext.diagnostics.report import Report, emit, format_number, scalars
from aniso_ext.diagnostics.rows import choose_device, choose_rows, load, open_paired
from aniso_ext.diagnostics.searches import by_halves, nearest
from aniso_ext.errors import InputError


@dataclass(frozen=True)
class OraclePoint:
    """One step of the path: the share ``alpha`` of the residual along its ``top_k`` leading directions is given."""

    top_k: int
    alpha: float
    energy: float
    alignment: AlignmentReport


@dataclass(frozen=True)
class OraclePathReport(Report):
    """All steps, by ``top_k`` then ``alpha``; see :func:`oracle_path`."""

    n: int
    n_available: int
    width: int
    points: tuple[OraclePoint, ...]
    warnings: tuple[str, ...] = ()

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"top_k": point.top_k, "alpha": point.alpha, "energy": point.energy, **scalars(point.alignment)}
            for point in self.points
        ]

    def __str__(self) -> str:
        names = ("delta_mu", "phi", "psi", "omega", "m_z", "m_x", "a_r", "paired_cosine", "recall_at_1", "recall_at_10")
        head = ("Delta_mu", "Phi", "Psi", "Omega", "M_Z", "M_X", "A_r", "cosine", "R@1", "R@10")
        lines = [
            f"oracle path of {self.n} pairs, width {self.width} (uses the pairs: an upper bound, not a method)",
            "  top-K  E(K)  alpha " + "".join(f"{name:>10}" for name in head),
        ]
        for point in self.points:
            values = "".join(f"{format_number(getattr(point.alignment, name)):>10}" for name in names)
            lines.append(f"  {point.top_k:>5} {point.energy:>5.2f} {point.alpha:>6.2f} {values}")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


def oracle_path(
    source: Any,
    target: Any,
    *,
    top_k: int | Sequence[int] | None = None,
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    k: int = 20,
    max_pairs: int | None = 2_000,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> OraclePathReport:
    """Walk from the shifted source to its paired target along the leading residual directions (METHOD section 5).

    With r_i = (x_i - m_x) - (y_i - m_y) and P_K the projector on the top-K eigenvectors of S_r::

        z_i(K, alpha) = Norm(y_i - m_y + m_x + alpha P_K r_i)

    alpha = 0 is the mean shift; K = D with alpha = 1 is the target itself. It reads the pairs that it is judged on:
    it shows what correcting K directions could be worth, and is no method for unpaired data.

    Args:
        source, target: [N, D] arrays or tensors, opened embedding sets, or paths; row i of both belongs to pair i.
        top_k: one or several K; 1, 16, 128 (those below D) and D when None.
        alphas: shares in [0, 1].
        k: neighbours of omega and mixing.
        max_pairs: above this many pairs, a uniform sample drawn with ``seed`` is used; each point is one alignment.
        seed: of the sample; psi is exact.
        device: "cpu" or "cuda"; None is the device of CUDA inputs, else a GPU if there is one, else the CPU.

    Raises:
        InputError: rows, widths, dtypes or options do not fit, n <= k, or a non-finite row.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> y = rng.normal(size=(300, 6)); y /= np.linalg.norm(y, axis=1, keepdims=True)
        >>> x = rng.normal(size=(300, 6)); x /= np.linalg.norm(x, axis=1, keepdims=True)
        >>> path = oracle_path(y, x, top_k=6, alphas=(0.0, 1.0), k=5)
        >>> [round(point.alignment.paired_cosine, 6) for point in path.points][1]
        1.0
    """
    if k < 1 or (max_pairs is not None and max_pairs <= k):
        raise InputError(f"need k >= 1 and max_pairs > k, got k = {k}, max_pairs = {max_pairs}")
    ys, xs = open_paired(minimum=max(3, k + 1), source=source, target=target)
    ranks = _ranks(top_k, ys.width)
    shares = [float(alpha) for alpha in alphas]
    if not shares or not all(0 <= alpha <= 1 for alpha in shares):
        raise InputError(f"alphas must be shares between 0 and 1, got {list(alphas)}")
    chosen = choose_rows(ys.count, max_pairs, seed)
    place = choose_device(device, source, target)
    y, x = (load(rows, chosen, place).double() for rows in (ys, xs))

    shifted = y - y.mean(dim=0) + x.mean(dim=0)
    residual = x - shifted
    spectrum, vectors = spectra.eigenpairs(spectra.second_moment(residual))
    curve = spectrum.cumsum(0) / spectrum.sum()
    settings = Settings(k=k, psi_pairs=None, seed=seed, half=by_halves(place))
    source_neighbours = nearest(y, k, half=settings.half)
    points = []
    for rank in ranks:
        step = residual @ vectors[:, :rank] @ vectors[:, :rank].T
        for alpha in shares:
            output = unit_rows(shifted + alpha * step)
            report = measure(y, x, output, settings, source_neighbours=source_neighbours)
            points.append(OraclePoint(rank, alpha, float(curve[rank - 1]), report))
    warnings = tuple(dict.fromkeys(text for point in points for text in point.alignment.warnings))
    emit(warnings)
    return OraclePathReport(y.shape[0], ys.count, ys.width, tuple(points), warnings)


def _ranks(top_k: int | Sequence[int] | None, width: int) -> tuple[int, ...]:
    if top_k is None:
        return (*(rank for rank in (1, 16, 128) if rank < width), width)
    ranks = (top_k,) if isinstance(top_k, int) else tuple(int(rank) for rank in top_k)
    if not ranks or not all(1 <= rank <= width for rank in ranks):
        raise InputError(f"top_k must lie between 1 and the width {width}, got {list(ranks)}")
    return ranks

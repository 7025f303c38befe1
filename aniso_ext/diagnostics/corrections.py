"""How far methods move their rows, and how much of that is a refinement within its bound (METHOD section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aniso_ext.diagnostics.report import Report, emit
from aniso_ext.diagnostics.rows import Rows, open_paired, open_rows
from aniso_ext.errors import InputError

BINS = 96
ROUNDING = 1e-9


@dataclass(frozen=True)
class Sizes:
    """Shares of the rows in the bins of the report, and what is left of them in four numbers.

    Shares are over all rows: they sum to less than one where a size is undefined.
    """

    shares: tuple[float, ...]
    mean: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True)
class Realised:
    """||z - z0|| from the initialisation to the refined stand-in, its bound, and the share of rows beyond it."""

    sizes: Sizes
    bound: float | None
    beyond: float | None


@dataclass(frozen=True)
class CorrectionReport(Report):
    """Sizes of the corrections of ``n`` rows by method; see :func:`corrections`."""

    n: int
    width: int
    length_edges: tuple[float, ...]
    angle_edges: tuple[float, ...]
    realised_edges: tuple[float, ...]
    lengths: dict[str, Sizes]
    angles: dict[str, Sizes]
    realised: dict[str, Realised]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        wide = max([8, *map(len, self.lengths)])
        lines = [
            f"corrections of {self.n} rows, width {self.width}",
            f"  {'method':<{wide}}  ||z - y||: mean, median, 95 %   angle, degrees: mean, median, 95 %",
        ]
        for name, sizes in self.lengths.items():
            angle = self.angles[name]
            lines.append(
                f"  {name:<{wide}}  {sizes.mean:>15.3f} {sizes.median:>7.3f} {sizes.p95:>6.3f}"
                f"  {angle.mean:>21.1f} {angle.median:>7.1f} {angle.p95:>6.1f}"
            )
        for name, found in self.realised.items():
            bound = "" if found.bound is None else f", bound {found.bound:.3f}, {found.beyond:.1%} beyond it"
            lines.append(
                f"  {name}: refined by {found.sizes.mean:.4f} on average, {found.sizes.largest:.4f} at most{bound}"
            )
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


def corrections(
    source: Any,
    stand_ins: Mapping[str, Any],
    *,
    initial: Mapping[str, Any] | None = None,
    bounds: Mapping[str, float] | None = None,
) -> CorrectionReport:
    """Measure how far each method moved its rows: ||z_i - y_i||, and the angle between z_i and y_i in degrees.

    Histograms have 96 equal bins from zero to the largest size of any method. For a refined method ``initial`` holds
    its rows before the refinement, ``aligner.closed_form().transform(source)``, and ``realised`` measures
    ||z_i - z0_i||, beside a bound such as ``aligner.summary_["eps_eff_largest"]``. The bound of METHOD D12 is relative
    to the length of e' before it is normalised and calibrated: a row of unit length turns by at most arcsin(eps), and a
    calibration can stretch that by the length that it takes off.

    Args:
        source: [N, D] array or tensor, opened embedding set, or path.
        stand_ins: stand-ins [N, D] by the name of their method.
        initial: [N, D] before the refinement, for some or all of these names.
        bounds: of ||z - z0||, for some or all names of ``initial``.

    Raises:
        InputError: no stand-ins, rows or widths that differ, names without stand-ins or without initial rows, a bound
            that is negative or not finite, or a non-finite row.

    Warns:
        DiagnosticsWarning: zero rows, which have no angle.

    Example:
        >>> import numpy as np
        >>> y = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> report = corrections(y, {"turned": y[::-1].copy()})
        >>> round(report.lengths["turned"].mean, 6), round(report.angles["turned"].median, 6)
        (1.414214, 90.0)
    """
    initial, bounds = dict(initial or {}), dict(bounds or {})
    if not stand_ins:
        raise InputError("there are no stand-ins to measure: pass arrays by the name of their method")
    _check_names(stand_ins, initial, bounds)
    (rows,) = open_paired(minimum=1, source=source)
    measured = {name: _distances(rows, open_rows(f"stand-in {name!r}", value)) for name, value in stand_ins.items()}
    refined = {
        name: _distances(open_rows(f"initial {name!r}", value), open_rows(f"stand-in {name!r}", stand_ins[name]))[0]
        for name, value in initial.items()
    }
    length_edges = _edges([lengths for lengths, _ in measured.values()])
    angle_edges = _edges([angles for _, angles in measured.values()])
    realised_edges = _edges([*refined.values(), *(np.array([value]) for value in bounds.values())])
    warnings = tuple(
        f"{int(np.isnan(angles).sum())} pairs of source and {name!r} have a zero row, which has no angle"
        for name, (_, angles) in measured.items()
        if np.isnan(angles).any()
    )
    emit(warnings)
    return CorrectionReport(
        n=rows.count,
        width=rows.width,
        length_edges=tuple(length_edges.tolist()),
        angle_edges=tuple(angle_edges.tolist()),
        realised_edges=tuple(realised_edges.tolist()) if refined else (),
        lengths={name: _sizes(lengths, length_edges) for name, (lengths, _) in measured.items()},
        angles={name: _sizes(angles, angle_edges) for name, (_, angles) in measured.items()},
        realised={name: _realised(values, realised_edges, bounds.get(name)) for name, values in refined.items()},
        warnings=warnings,
    )


def _check_names(stand_ins: Mapping[str, Any], initial: Mapping[str, Any], bounds: Mapping[str, float]) -> None:
    for name in initial:
        if name not in stand_ins:
            raise InputError(f"initial rows of {name!r} have no stand-ins: there are {', '.join(stand_ins)}")
    for name, value in bounds.items():
        if name not in initial:
            raise InputError(f"the bound of {name!r} needs its rows before the refinement: pass them in initial")
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"the bound of {name!r} must be finite and not negative, got {value!r}")


def _distances(before: Rows, after: Rows) -> tuple[np.ndarray, np.ndarray]:
    """||z - y|| and the angle in degrees of each pair of rows; the half-angle form is exact for small angles too."""
    if before.width != after.width or before.count != after.count:
        raise InputError(
            f"{before.name} is [{before.count}, {before.width}] but {after.name} is [{after.count}, {after.width}]: "
            "row i of both must belong together"
        )
    lengths, angles = [], []
    for y, z in zip(before.batches(), after.batches(), strict=True):
        lengths.append((z - y).norm(dim=1))
        u, w = (rows / rows.norm(dim=1, keepdim=True) for rows in (y, z))
        angles.append(torch.rad2deg(2 * torch.atan2((u - w).norm(dim=1), (u + w).norm(dim=1))))
    return torch.cat(lengths).numpy(), torch.cat(angles).numpy()


def _edges(samples: list[np.ndarray]) -> np.ndarray:
    """Edges of equal bins from zero to the largest finite value; to one where all are zero but for rounding."""
    largest = max((float(np.nanmax(values)) for values in samples if np.isfinite(values).any()), default=0.0)
    return np.linspace(0.0, largest if largest > ROUNDING else 1.0, BINS + 1)


def _sizes(values: np.ndarray, edges: np.ndarray) -> Sizes:
    finite = values[np.isfinite(values)]
    shares = tuple((np.histogram(finite, bins=edges)[0] / len(values)).tolist())
    if not len(finite):
        return Sizes(shares, *(math.nan,) * 4)
    median, p95 = np.quantile(finite, (0.5, 0.95))
    return Sizes(shares, float(finite.mean()), float(median), float(p95), float(finite.max()))


def _realised(values: np.ndarray, edges: np.ndarray, bound: float | None) -> Realised:
    return Realised(_sizes(values, edges), bound, None if bound is None else float((values > bound).mean()))

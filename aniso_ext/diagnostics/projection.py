"""All clouds in one plane: the two leading principal axes of their union."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from aniso_ext.diagnostics import spectra
from aniso_ext.diagnostics.clouds import SOURCE, TARGET, open_clouds, sample
from aniso_ext.diagnostics.report import Report
from aniso_ext.errors import InputError


@dataclass(frozen=True)
class ProjectionReport(Report):
    """Coordinates of ``n`` rows of each cloud in the plane of :func:`projection`."""

    n: int
    n_available: int
    width: int
    explained: tuple[float, float]
    coordinates: dict[str, tuple[tuple[float, float], ...]]

    def __str__(self) -> str:
        first, second = self.explained
        return (
            f"projection of {self.n} rows of {', '.join(self.coordinates)}: axes with {first:.1%} and {second:.1%} "
            "of the pooled variance"
        )


def projection(
    source: Any,
    target: Any,
    stand_ins: Mapping[str, Any],
    *,
    max_rows: int | None = 2_000,
    seed: int = 0,
) -> ProjectionReport:
    """Project target, source and stand-ins on the two leading principal axes of all of them together.

    Axes are the leading eigenvectors of the covariance of the pooled rows, every cloud with the same pairs and so with
    the same weight; coordinates are taken from the pooled mean. The sign of an axis makes its largest entry positive.
    A plane shows what two axes show: ``explained`` are their shares of the pooled variance.

    Args:
        source, target: [N, D] arrays or tensors, opened embedding sets, or paths; row i of both belongs to pair i.
        stand_ins: stand-ins [N, D] of the source by the name of their method; may be empty.
        max_rows: above this many pairs, a uniform sample drawn with ``seed`` is taken; None takes all.
        seed: of the sample.

    Raises:
        InputError: rows, widths or options do not fit, a width below 2, or a non-finite row.

    Example:
        >>> import numpy as np
        >>> y = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> report = projection(y, -y, {})
        >>> [round(share, 6) for share in report.explained]
        [0.5, 0.5]
    """
    opened = open_clouds(source, target, stand_ins, minimum=1)
    width, count = opened[TARGET].width, opened[TARGET].count
    if width < 2:
        raise InputError(f"a plane needs embeddings of width 2 or more, got {width}")
    chosen = sample(count, max_rows, seed)
    clouds = {name: opened[name].read(chosen) for name in (TARGET, SOURCE, *stand_ins)}
    mean = torch.stack([rows.mean(dim=0) for rows in clouds.values()]).mean(dim=0)
    covariance = torch.stack([spectra.second_moment(rows - mean) for rows in clouds.values()]).mean(dim=0)
    values, vectors = spectra.eigenpairs(covariance)
    axes = vectors[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    total = float(values.sum())
    first, second = (float(value) / total if total > 0 else math.nan for value in values[:2])
    return ProjectionReport(
        n=len(chosen),
        n_available=count,
        width=width,
        explained=(first, second),
        coordinates={
            name: tuple((across, up) for across, up in ((rows - mean) @ axes).tolist()) for name, rows in clouds.items()
        },
    )

"""Moments whose products are made on a device; not imported by the package, which does without torch."""

from __future__ import annotations

import torch

from aniso_ext.stats.moments import Moments


class DeviceMoments:
    """Float64 sums of rows and of their products on a device, as a state of :class:`aniso_ext.stats.Moments`.

    Products are taken about the mean of the first batch. Rounding of S is at most a few n eps max |y - pivot|^2 before
    the division by n, so that for unit rows S is right to about 1e-14, wherever the rows move after the first batch.

    Example:
        >>> import torch
        >>> sums = DeviceMoments(2, torch.device("cpu"))
        >>> sums.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=torch.float64))
        >>> sums.moments().covariance.tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._count = 0
        self._pivot: torch.Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, batch: torch.Tensor) -> None:
        """Take in float64 rows [n, D] of the device, n at least 1."""
        if self._pivot is None:
            self._pivot = batch.mean(dim=0)
        centred = batch - self._pivot
        self._sum += centred.sum(dim=0)
        self._scatter.addmm_(centred.T, centred)
        self._count += len(batch)

    def moments(self) -> Moments:
        """What was seen so far."""
        width = len(self._sum)
        if self._pivot is None:
            return Moments(width)
        offset = self._sum / self._count
        return Moments.from_state_dict(
            {
                "width": width,
                "diagonal": 0,
                "count": self._count,
                "mean_high": self._pivot.cpu().numpy(),
                "mean_low": offset.cpu().numpy(),
                "scatter": (self._scatter - self._count * offset.outer(offset)).cpu().numpy(),
            }
        )

"""Stand-ins made of target rows: the mean of the rows of the target that are nearest to what a map has made."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aniso_ext.errors import InputError

if TYPE_CHECKING:
    from aniso_ext.align.base import Aligner

MOST_ROWS = 65_536
"""Of the target, kept in memory: at width 1280 335 MB."""
_CHUNK = 4096


class NeighbourMean:
    """Rows [n, D] to the unit mean of the ``count`` target rows x nearest to each by direction from the means.

        z' = Norm( sum_k x_(k)(z) ),  x_(k)(z): the row with the k-th largest cos(z - m_z, x - m_x)

    A map from texts to images cannot say more of an image than the text does, and what it says in the weak directions
    of the images is mostly wrong (docs/mllm.md). Neighbours are found by the strong ones, and bring their own weak ones
    along. No pair is used; a target that holds the partners of the stand-ins would bring them in.

    Args:
        target: [M, D] unpaired rows, in any order.
        centre: [D] mean of the stand-ins, m_z.
        count: neighbours, at least 1 and at most M.

    Attributes:
        fingerprint: of the rows and the options.

    Raises:
        InputError: shapes do not fit, there are fewer rows than neighbours, or values that are not finite.

    Example:
        >>> import torch
        >>> nearest = NeighbourMean(torch.tensor([[0.6, 0.8], [0.8, -0.6]]), torch.tensor([0.5, 0.0]), count=1)
        >>> nearest(torch.tensor([[0.5, 0.3]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(self, target: torch.Tensor, centre: torch.Tensor, *, count: int = 5) -> None:
        if target.dim() != 2 or centre.shape != target.shape[1:]:
            raise InputError(
                f"target and centre must be [M, D] and [D], got {list(target.shape)} and {list(centre.shape)}"
            )
        if not 1 <= count <= len(target):
            raise InputError(f"neighbours must be from 1 to the {len(target)} rows of the target, got {count}")
        if not bool(torch.isfinite(target).all() and torch.isfinite(centre).all()):
            raise InputError("target or centre has values that are not finite: drop these rows")
        self.count = count
        self.rows = target.float()
        self.centre = centre.float()
        centred = self.rows - self.rows.mean(dim=0, dtype=torch.float64).float()
        self.directions = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-20)
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.rows, self.centre):
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        self.fingerprint = f"neighbours:{count}:{digest.hexdigest()}"

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @classmethod
    def of(
        cls, aligner: Aligner | None, source: Any, target: Any, *, count: int = 5, rows: int = 4096, seed: int = 0
    ) -> NeighbourMean:
        """For what an aligner makes of a source; None stands for the source rows themselves.

        Args:
            source, target: unpaired embeddings, anything that ``fit`` takes; the centre is the mean over ``rows`` of
                the source, and at most 65 536 rows of the target are kept, both drawn by ``seed``.

        Raises:
            InputError: as the class.
            DataError: a path that holds no usable embeddings.
        """
        from aniso_ext.align.residual import drawn_rows

        random = np.random.default_rng(seed)
        standins = drawn_rows(source, rows, random)
        if aligner is not None:
            standins = aligner.transform(standins)
        centre = standins.mean(dim=0, dtype=torch.float64)
        return cls(drawn_rows(target, MOST_ROWS, random), centre, count=count)

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """Positions [n, count] in the target, the nearest first."""
        self._move(rows.device)
        found = [
            ((part - self.centre) @ self.directions.T).topk(self.count, dim=1).indices
            for part in rows.float().split(_CHUNK)
        ]
        return torch.cat(found) if found else torch.empty(0, self.count, dtype=torch.long, device=rows.device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Unit rows [n, D], of the dtype of ``rows``; no gradient passes."""
        with torch.no_grad():
            total = self.rows[self.nearest(rows)].sum(dim=1)
            return (total / total.norm(dim=1, keepdim=True).clamp_min(1e-20)).to(rows.dtype)

    def _move(self, device: torch.device) -> None:
        if self.rows.device != device:
            self.rows, self.centre = self.rows.to(device), self.centre.to(device)
            self.directions = self.directions.to(device)

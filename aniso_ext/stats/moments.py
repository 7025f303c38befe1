"""Mean and covariance in one pass.

Each chunk of rows is centred on its own float64 mean before the product is taken, and chunks are combined with Chan's
update, so nothing cancels however far the data lie from the origin. The mean is kept as an unevaluated sum of two
float64 vectors: with one vector, the rounding of a mean of 1e3 would already show in covariances of variance 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from aniso_ext.errors import InputError
from aniso_ext.stats.batches import (
    as_batch,
    bad_row_error,
    check_keys,
    chunks,
    positive_count,
    state_array,
    state_count,
)

_KEYS = ("width", "diagonal", "count", "mean_high", "mean_low", "scatter")


class Moments:
    """Count, mean m and population covariance S = (1/n) sum (y - m)(y - m)^T of rows [n, D], streamed and mergeable.

    Args:
        width: D.
        diagonal: keep only the variances [D] instead of the covariance [D, D], for widths where D^2 is too much.

    Input batches are [n, D] of any floating dtype; all state is float64. Memory: D^2 (or D) numbers, whatever N is.

    Raises:
        InputError: wrong shape or dtype, a non-finite row (named) or values whose squares overflow; the state is
            unchanged.

    Example:
        >>> import numpy as np
        >>> rows = np.array([[0.0, 1.0], [2.0, 1.0]], dtype=np.float32)
        >>> moments = Moments(2).update(rows[:1]).merge(Moments(2).update(rows[1:]))
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (2, [1.0, 1.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, width: int, *, diagonal: bool = False) -> None:
        self.width = positive_count(width, "width")
        self.diagonal = bool(diagonal)
        self._count = 0
        self._mean_high = np.zeros(self.width)
        self._mean_low = np.zeros(self.width)
        self._scatter = np.zeros(self.width if self.diagonal else (self.width, self.width))

    def __repr__(self) -> str:
        return f"Moments(width={self.width}, diagonal={self.diagonal}, count={self._count})"

    def update(self, batch: Any) -> Moments:
        """Take in the rows of ``batch`` [n, D]; n = 0 is allowed."""
        batch = as_batch(batch, self.width, "moments")
        pending: Moments | None = None
        for start, rows in chunks(batch):
            part = self._of_chunk(rows, start)
            pending = part if pending is None else pending.merge(part)
        return self if pending is None else self.merge(pending)

    def _of_chunk(self, rows: np.ndarray, start: int) -> Moments:
        rows = rows.astype(np.float64)
        part = Moments.__new__(Moments)
        part.width, part.diagonal, part._count = self.width, self.diagonal, len(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            pivot = rows.mean(axis=0)
            if not np.isfinite(pivot).all():
                good = np.isfinite(rows)
                if not good.all():
                    raise bad_row_error("moments", good, self._count, start, "is not finite")
                raise InputError("moments: the sum of the rows overflows float64: scale the embeddings down")
            rows -= pivot
            part._mean_high, part._mean_low = pivot, rows.mean(axis=0)
            part._scatter = np.einsum("nd,nd->d", rows, rows) if self.diagonal else rows.T @ rows
            # The pivot is a rounded mean: what it misses by, squared, does not belong to the scatter.
            part._scatter -= len(rows) * self._square(part._mean_low)
        part._check_finite()
        return part

    def merge(self, other: Moments) -> Moments:
        """Take in everything that ``other`` has seen; ``other`` is left as it is."""
        if not isinstance(other, Moments) or (other.width, other.diagonal) != (self.width, self.diagonal):
            raise InputError(f"cannot merge {other!r} into {self!r}: width and diagonal must agree")
        if other._count == 0:
            return self
        if self._count == 0:
            self._count = other._count
            self._mean_high, self._mean_low = other._mean_high.copy(), other._mean_low.copy()
            self._scatter = other._scatter.copy()
            return self
        count = self._count + other._count
        share = other._count / count
        with np.errstate(over="ignore", invalid="ignore"):
            high, low = _two_sum(other._mean_high, -self._mean_high)
            difference = high + (low + (other._mean_low - self._mean_low))
            scatter = self._square(difference)
            scatter *= self._count * share
            scatter += other._scatter
            if not np.isfinite(scatter).all():
                raise InputError("moments: squared differences overflow float64: scale the embeddings down")
            step = difference * share
            high, low = _two_sum(self._mean_high, step)
            self._mean_high, self._mean_low = _two_sum(high, low + self._mean_low)
        self._scatter += scatter
        self._count = count
        return self

    def _square(self, vector: np.ndarray) -> np.ndarray:
        return vector * vector if self.diagonal else np.outer(vector, vector)

    def _check_finite(self) -> None:
        if not np.isfinite(self._scatter).all():
            raise InputError("moments: squared values overflow float64: scale the embeddings down")

    @property
    def count(self) -> int:
        """n, the number of rows seen."""
        return self._count

    def _seen(self) -> int:
        if self._count == 0:
            raise InputError("moments: no rows seen yet: call update first")
        return self._count

    @property
    def mean(self) -> np.ndarray:
        """m [D]."""
        self._seen()
        return self._mean_high + self._mean_low

    @property
    def covariance(self) -> np.ndarray:
        """S [D, D], population (divided by n)."""
        if self.diagonal:
            raise InputError("moments: diagonal=True keeps only the variance: use .variance or Moments(width)")
        return self._scatter / self._seen()

    @property
    def variance(self) -> np.ndarray:
        """Diagonal of S, [D]; never negative."""
        diagonal = self._scatter if self.diagonal else np.diagonal(self._scatter)
        return np.maximum(diagonal / self._seen(), 0.0)

    @property
    def std(self) -> np.ndarray:
        """Square root of the variance, [D]."""
        return np.sqrt(self.variance)

    @property
    def trace(self) -> float:
        """tr S."""
        return float(self.variance.sum())

    def state_dict(self) -> dict[str, Any]:
        """Integers and float64 arrays from which :meth:`from_state_dict` restores the accumulator bit for bit."""
        return {
            "width": self.width,
            "diagonal": int(self.diagonal),
            "count": self._count,
            "mean_high": self._mean_high.copy(),
            "mean_low": self._mean_low.copy(),
            "scatter": self._scatter.copy(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Moments:
        """The accumulator that :meth:`state_dict` saved.

        Raises:
            InputError: a key is missing or unknown, or a shape or value does not fit.
        """
        check_keys(state, _KEYS, "Moments")
        moments = cls(state_count(state, "width", "Moments"), diagonal=bool(state_count(state, "diagonal", "Moments")))
        moments._count = state_count(state, "count", "Moments")
        for key in ("mean_high", "mean_low", "scatter"):
            shape = getattr(moments, f"_{key}").shape
            setattr(moments, f"_{key}", state_array(state, key, shape, np.float64, "Moments"))
        return moments


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knuth's error-free sum: high = fl(a + b) and high + low = a + b exactly."""
    high = a + b
    virtual = high - a
    return high, (a - (high - virtual)) + (b - virtual)


def fit_moments(batches: Iterable[Any], *, diagonal: bool = False) -> Moments:
    """Moments of an iterable of [n, D] batches; D is taken from the first.

    Raises:
        InputError: there is no batch, or one does not fit the first.

    Example:
        >>> import numpy as np
        >>> fit_moments([np.ones((3, 2)), np.zeros((1, 2))]).mean.tolist()
        [0.75, 0.75]
    """
    moments: Moments | None = None
    for batch in batches:
        if moments is None:
            shape = np.shape(batch)
            if len(shape) != 2:
                raise InputError(f"moments: a batch must have shape [n, D], got {list(shape)}")
            moments = Moments(shape[1], diagonal=diagonal)
        moments.update(batch)
    if moments is None:
        raise InputError("moments: there are no batches: the input is empty")
    return moments

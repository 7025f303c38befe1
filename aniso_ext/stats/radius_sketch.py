"""Quantiles of block radii from a log-linear histogram.

The positive float32 numbers, read as integers, are in order; dropping the low 23 - p mantissa bits of that integer
leaves a bin number. Every octave [2^e, 2^(e+1)) is so cut into 2^p equal bins of width 2^(e-p), which is at most 2^-p
of any value in it. Counts are integers: merging is exact and does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Mapping
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

FLOOR_EXPONENT = -40
"""Radii below 2^-40 share one bin: an error of at most 2^-40 there, and a zero opens no octaves."""
OCTAVE_GROUP = 32
"""The table spans whole groups of this many octaves, one of which is [2^-31, 2): unit embeddings never make it grow,
and pages of octaves without radii need not be backed by memory."""
MINIMUM_GAP = 2.0**-22
"""Relative distance kept between knots: two units in the last place of float32, so that they stay apart when stored."""
_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127
_KEYS = ("blocks", "precision", "count", "first_octave", "counts", "minimum", "maximum")


class RadiusSketch:
    """Streaming quantiles of non-negative radii [n, M], one independent sketch a block (METHOD D9).

    Error: for every level q, ``|Q_sketch(q) - Q(q)| <= relative_error * Q(q)`` with Q the linear-interpolation quantile
    of all radii seen (``numpy.quantile``) and ``relative_error = 2^-p + 2^-23`` (bin width; rounding of float64 radii
    to float32); below 2^-40 the error is at most 2^-40 absolute. q = 0 and q = 1 are exact. Why: each of the two order
    statistics that the quantile interpolates is estimated inside its own bin, and interpolation keeps the bound.

    Args:
        blocks: M.
        precision: p, mantissa bits kept, 1 to 16. Memory is at most 32 times 8 M 2^p bytes for unit embeddings (p = 11,
            M = 64: 32 MB), whatever the number of rows; a saved state keeps occupied octaves only, about 12.

    Radii are [n, M] of any floating dtype.

    Raises:
        InputError: wrong shape or dtype, or a row with a negative, non-finite or float32-overflowing radius (named);
            the state is unchanged.

    Example:
        >>> import numpy as np
        >>> sketch = RadiusSketch(1).update(np.linspace(1.0, 2.0, 1001)[:, None])
        >>> sketch.quantiles([0.0, 1.0]).tolist()
        [[1.0, 2.0]]
        >>> bool(abs(sketch.quantiles([0.5])[0, 0] - 1.5) < 1.5 * sketch.relative_error)
        True
    """

    def __init__(self, blocks: int, *, precision: int = 11) -> None:
        self.blocks = positive_count(blocks, "blocks")
        self.precision = positive_count(precision, "precision")
        if self.precision > 16:
            raise InputError(f"precision must be at most 16 mantissa bits, got {precision}")
        self._count = 0
        # Column 0 counts radii below the floor; then come the bins of the octaves from _first_octave on.
        self._first_octave = 0
        self._counts = np.zeros((self.blocks, 1), dtype=np.int64)
        self._minimum = np.full(self.blocks, np.inf)
        self._maximum = np.full(self.blocks, -np.inf)

    def __repr__(self) -> str:
        return f"RadiusSketch(blocks={self.blocks}, precision={self.precision}, count={self._count})"

    @property
    def count(self) -> int:
        """n, the number of rows seen."""
        return self._count

    @property
    def relative_error(self) -> float:
        """Bound on the relative error of every quantile: 2^-p + 2^-23."""
        return 2.0**-self.precision + 2.0**-23

    @property
    def minimum(self) -> np.ndarray:
        """Smallest radius of each block, exact, [M]."""
        self._seen()
        return self._minimum.copy()

    @property
    def maximum(self) -> np.ndarray:
        """Largest radius of each block, exact, [M]."""
        self._seen()
        return self._maximum.copy()

    def _seen(self) -> int:
        if self._count == 0:
            raise InputError("radius sketch: no radii seen yet: call update first")
        return self._count

    def update(self, radii: Any) -> RadiusSketch:
        """Take in ``radii`` [n, M]; n = 0 is allowed."""
        radii = as_batch(radii, self.blocks, "radius sketch")
        pieces = [self._checked(rows, start) for start, rows in chunks(radii)]
        for rows in pieces:
            self._add(rows)
        if len(radii):
            self._minimum = np.minimum(self._minimum, radii.min(axis=0))
            self._maximum = np.maximum(self._maximum, radii.max(axis=0))
            self._count += len(radii)
        return self

    def _checked(self, rows: np.ndarray, start: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            single = rows.astype(np.float32)
        # One comparison catches NaN, negatives and infinities.
        good = (single >= 0) & (single < np.inf)
        if not good.all():
            reason = "has a radius that is negative, not finite or above the float32 range"
            raise bad_row_error("radius sketch", good, self._count, start, reason)
        return np.abs(single)  # -0.0 has the sign bit set

    def _add(self, rows: np.ndarray) -> None:
        bins = rows.view(np.int32) >> (_MANTISSA_BITS - self.precision)
        floor = (FLOOR_EXPONENT + _EXPONENT_BIAS) << self.precision
        lowest, highest = int(bins.min()), int(bins.max())
        if highest >= floor:
            if lowest < floor:
                lowest = int(bins[bins >= floor].min())
            self._cover(lowest >> self.precision, highest >> self.precision)
        first = self._first_octave << self.precision
        columns = np.where(bins < floor, 0, bins - first + 1).astype(np.int64)
        columns += np.arange(self.blocks) * self._counts.shape[1]
        np.add.at(self._counts.reshape(-1), columns.ravel(), 1)  # touches occupied pages only, unlike a bincount

    def _octaves(self) -> int:
        return (self._counts.shape[1] - 1) >> self.precision

    def _occupied(self) -> tuple[int, np.ndarray]:
        """First octave and table, without empty octaves at either end; a copy."""
        octaves = self._counts[:, 1:].reshape(self.blocks, self._octaves(), 1 << self.precision)
        occupied = np.flatnonzero(octaves.any(axis=(0, 2)))
        if not len(occupied):
            return 0, self._counts[:, :1].copy()
        first, stop = int(occupied[0]), int(occupied[-1]) + 1
        inside = self._counts[:, 1 + (first << self.precision) : 1 + (stop << self.precision)]
        return self._first_octave + first, np.concatenate((self._counts[:, :1], inside), axis=1)

    def _cover(self, first: int, last: int) -> None:
        """Widen the table to groups of octaves that hold the (biased) octaves first..last; it never shrinks."""
        first -= first % OCTAVE_GROUP
        last += OCTAVE_GROUP - 1 - last % OCTAVE_GROUP
        octaves = self._octaves()
        if octaves:
            first = min(first, self._first_octave)
            last = max(last, self._first_octave + octaves - 1)
        if octaves == last - first + 1:
            return
        wide = np.zeros((self.blocks, 1 + ((last - first + 1) << self.precision)), dtype=np.int64)
        wide[:, 0] = self._counts[:, 0]
        offset = 1 + (max(0, self._first_octave - first) << self.precision)
        wide[:, offset : offset + self._counts.shape[1] - 1] = self._counts[:, 1:]
        self._counts, self._first_octave = wide, first

    def merge(self, other: RadiusSketch) -> RadiusSketch:
        """Take in everything that ``other`` has seen, exactly; ``other`` is left as it is."""
        same = isinstance(other, RadiusSketch) and (other.blocks, other.precision) == (self.blocks, self.precision)
        if not same:
            raise InputError(f"cannot merge {other!r} into {self!r}: blocks and precision must agree")
        first, counts = other._occupied()
        if counts.shape[1] > 1:
            self._cover(first, first + ((counts.shape[1] - 1) >> self.precision) - 1)
            offset = 1 + ((first - self._first_octave) << self.precision)
            self._counts[:, offset : offset + counts.shape[1] - 1] += counts[:, 1:]
        self._counts[:, 0] += counts[:, 0]
        self._minimum = np.minimum(self._minimum, other._minimum)
        self._maximum = np.maximum(self._maximum, other._maximum)
        self._count += other._count
        return self

    def quantiles(self, q: Any) -> np.ndarray:
        """Quantiles [M, K] of the levels ``q`` [K] in [0, 1], in the sense of ``numpy.quantile(method="linear")``."""
        levels = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise InputError("radius sketch: quantile levels must be a vector of numbers between 0 and 1")
        last = self._seen() - 1
        position = levels * last
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, last)
        below, above = self._order_statistics(lower), self._order_statistics(upper)
        return below + (position - lower) * (above - below)

    def _order_statistics(self, ranks: np.ndarray) -> np.ndarray:
        """Estimates [M, K] of the values at zero-based ``ranks`` [K], each inside the bin that holds the value."""
        values = np.empty((self.blocks, len(ranks)))
        for block in range(self.blocks):
            counts = self._counts[block]
            cumulative = np.cumsum(counts)
            column = np.searchsorted(cumulative, ranks, side="right")
            inside = (ranks - (cumulative[column] - counts[column]) + 0.5) / counts[column]
            lower, width = self._edges(column)
            values[block] = lower + inside * width
        values = np.clip(values, self._minimum[:, None], self._maximum[:, None])
        values[:, ranks == 0] = self._minimum[:, None]
        values[:, ranks == self._count - 1] = self._maximum[:, None]
        return values

    def _edges(self, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower edge and width of histogram columns."""
        bins = column - 1
        octave = (bins >> self.precision) + self._first_octave - _EXPONENT_BIAS
        step = bins & ((1 << self.precision) - 1)
        width = np.ldexp(1.0, octave - self.precision)
        lower = np.ldexp(1.0, octave) + step * width
        under = column == 0
        return np.where(under, 0.0, lower), np.where(under, 2.0**FLOOR_EXPONENT, width)

    def knots(self, K: int = 1024) -> np.ndarray:
        """K knots [M, K] of each block's radius distribution, strictly increasing and positive.

        Levels are q_i = sin^2(pi i / (2 (K - 1))): denser in both tails, from the minimum to the maximum. Tied
        quantiles are spread around their common value until neighbours are a factor 1 + 2^-22 apart (a shift of at most
        K 2^-22), so that linear interpolation between knots never divides by zero, in float32 either, and a constant
        radius lands in the middle of the target's distribution. Blocks without ties keep their quantiles unchanged.
        """
        if isinstance(K, bool) or not isinstance(K, (int, np.integer)) or K < 2:
            raise InputError(f"a radius table needs at least 2 knots, got {K!r}")
        values = self.quantiles(np.sin(0.5 * np.pi * np.arange(K) / (K - 1)) ** 2)
        values = np.maximum(values, 2.0**FLOOR_EXPONENT)
        tied = (values[:, 1:] < values[:, :-1] * (1 + MINIMUM_GAP)).any(axis=1)
        values[tied] = _separate(values[tied])
        return values

    def state_dict(self) -> dict[str, Any]:
        """Integers and arrays from which :meth:`from_state_dict` restores the sketch exactly."""
        first_octave, counts = self._occupied()
        return {
            "blocks": self.blocks,
            "precision": self.precision,
            "count": self._count,
            "first_octave": first_octave,
            "counts": counts,
            "minimum": self._minimum.copy(),
            "maximum": self._maximum.copy(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RadiusSketch:
        """The sketch that :meth:`state_dict` saved.

        Raises:
            InputError: a key is missing or unknown, a shape does not fit, or the counts do not add up.
        """
        kind = "RadiusSketch"
        check_keys(state, _KEYS, kind)
        sketch = cls(state_count(state, "blocks", kind), precision=state_count(state, "precision", kind))
        sketch._count = state_count(state, "count", kind)
        sketch._first_octave = state_count(state, "first_octave", kind)
        columns = np.shape(state["counts"])[-1] if np.ndim(state["counts"]) == 2 else 0
        sketch._counts = state_array(state, "counts", (sketch.blocks, columns), np.int64, kind)
        whole_octaves = columns >= 1 and (columns - 1) % (1 << sketch.precision) == 0
        if not whole_octaves or (sketch._counts < 0).any() or (sketch._counts.sum(axis=1) != sketch._count).any():
            raise InputError(f"{kind} state: counts must be whole octaves whose rows add up to {sketch._count}")
        if sketch._count:
            sketch._minimum = state_array(state, "minimum", (sketch.blocks,), np.float64, kind)
            sketch._maximum = state_array(state, "maximum", (sketch.blocks,), np.float64, kind)
        return sketch


def _separate(values: np.ndarray) -> np.ndarray:
    """Sorted positive rows with every gap at least MINIMUM_GAP (relative): ties spread evenly around their value.

    The least sequence above the values and the greatest one below them are both so separated, hence their geometric
    mean is too.
    """
    ramp = np.arange(values.shape[1]) * (2 * MINIMUM_GAP)
    level = np.log(values) - ramp
    above = np.maximum.accumulate(level, axis=1)
    below = np.minimum.accumulate(level[:, ::-1], axis=1)[:, ::-1]
    return np.exp(0.5 * (above + below) + ramp)

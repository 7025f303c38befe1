"""First and second circular moments of block phases (METHOD section 3)."""

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

_KEYS = ("blocks", "count", "first_sum", "second_sum")
_UNIT_TOLERANCE = 1e-2
"""How far cos^2 + sin^2 may be from 1: bfloat16 and float16 directions pass, other numbers do not."""


class PhaseMoments:
    """E e^{i theta_k} and M_kl = E e^{i (theta_k - theta_l)} of phases [n, M], streamed and mergeable (METHOD 3).

    Sums of unit numbers cannot cancel badly: both are plain complex128 sums, and merging adds them.

    Args:
        blocks: M.

    Raises:
        InputError: wrong shape or dtype, or a row (named) that is not finite or, given as (cos, sin), not of unit
            length; the state is unchanged.

    Example:
        >>> import numpy as np
        >>> moments = PhaseMoments(2).update(np.array([[0.0, 0.0], [np.pi, np.pi]]))
        >>> bool(abs(moments.first[0]) < 1e-15), float(moments.second[0, 1].real)
        (True, 1.0)
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = positive_count(blocks, "blocks")
        self._count = 0
        self._first = np.zeros(self.blocks, dtype=np.complex128)
        self._second = np.zeros((self.blocks, self.blocks), dtype=np.complex128)

    def __repr__(self) -> str:
        return f"PhaseMoments(blocks={self.blocks}, count={self._count})"

    def update(self, phases: Any) -> PhaseMoments:
        """Take in angles theta [n, M] in radians, or a tuple (cos, sin) of two [n, M] arrays."""
        parts = phases if isinstance(phases, tuple) else (phases,)
        if len(parts) not in (1, 2):
            raise InputError(f"phase moments: pass theta or the tuple (cos, sin), got a tuple of {len(parts)}")
        arrays = [as_batch(part, self.blocks, "phase moments") for part in parts]
        if any(len(array) != len(arrays[0]) for array in arrays):
            raise InputError(f"phase moments: cos has {len(arrays[0])} rows and sin {len(arrays[1])}")
        first, second = np.zeros_like(self._first), np.zeros_like(self._second)
        for start, rows in chunks(arrays[0]):
            pieces = [array[start : start + len(rows)].astype(np.float64) for array in arrays]
            unit = self._unit(pieces, start)
            first += unit.sum(axis=0)
            second += unit.T @ unit.conj()
        self._first += first
        self._second += second
        self._count += len(arrays[0])
        return self

    def _unit(self, pieces: list[np.ndarray], start: int) -> np.ndarray:
        """e^{i theta} [n, M] of one chunk of theta or of (cos, sin)."""
        if len(pieces) == 1:
            good = np.isfinite(pieces[0])
            if not good.all():
                raise bad_row_error("phase moments", good, self._count, start, "is not finite")
            return np.cos(pieces[0]) + 1j * np.sin(pieces[0])
        with np.errstate(over="ignore", invalid="ignore"):
            squared = pieces[0] ** 2 + pieces[1] ** 2
            good = np.abs(squared - 1) <= _UNIT_TOLERANCE
        if not good.all():
            raise bad_row_error("phase moments", good, self._count, start, "has cos^2 + sin^2 different from 1")
        return (pieces[0] + 1j * pieces[1]) / np.sqrt(squared)

    def merge(self, other: PhaseMoments) -> PhaseMoments:
        """Take in everything that ``other`` has seen; ``other`` is left as it is."""
        if not isinstance(other, PhaseMoments) or other.blocks != self.blocks:
            raise InputError(f"cannot merge {other!r} into {self!r}: blocks must agree")
        self._first += other._first
        self._second += other._second
        self._count += other._count
        return self

    @property
    def count(self) -> int:
        """n, the number of rows seen."""
        return self._count

    def _seen(self) -> int:
        if self._count == 0:
            raise InputError("phase moments: no phases seen yet: call update first")
        return self._count

    @property
    def first(self) -> np.ndarray:
        """E e^{i theta_k}, complex128 [M]."""
        return self._first / self._seen()

    @property
    def second(self) -> np.ndarray:
        """M_kl = E e^{i (theta_k - theta_l)}, Hermitian complex128 [M, M] with ones on the diagonal."""
        return self._second / self._seen()

    def connected(self) -> np.ndarray:
        """M_kl - E e^{i theta_k} E e^{-i theta_l}, [M, M]: the coupling that the means do not explain (METHOD D5)."""
        first = self.first
        return self.second - np.outer(first, first.conj())

    def state_dict(self) -> dict[str, Any]:
        """Integers and arrays from which :meth:`from_state_dict` restores the accumulator bit for bit."""
        return {
            "blocks": self.blocks,
            "count": self._count,
            "first_sum": self._first.copy(),
            "second_sum": self._second.copy(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PhaseMoments:
        """The accumulator that :meth:`state_dict` saved.

        Raises:
            InputError: a key is missing or unknown, or a shape or value does not fit.
        """
        kind = "PhaseMoments"
        check_keys(state, _KEYS, kind)
        moments = cls(state_count(state, "blocks", kind))
        moments._count = state_count(state, "count", kind)
        moments._first = state_array(state, "first_sum", (moments.blocks,), np.complex128, kind)
        moments._second = state_array(state, "second_sum", (moments.blocks, moments.blocks), np.complex128, kind)
        return moments

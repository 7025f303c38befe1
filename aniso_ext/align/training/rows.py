"""The rows a stage is trained on: a bounded random sample of a stream, held in memory, split, drawn in batches."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch

from aniso_ext.align.processes import check_batch_rows, share_of
from aniso_ext.align.rows import Rows
from aniso_ext.errors import InputError

TRAINING_ROWS = 2**18
HELD_OUT_SHARE = 0.05
MOST_HELD_OUT = 8192
_SAMPLE, _SPLIT, _ORDER = range(3)
_KEPT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class RowSampler:
    """Collects a fixed random subset of a stream of known length: every subset of its size is equally likely.

    The rows that are taken are a function of (``count``, ``most``, ``seed``, ``name``), not of how the stream is cut
    into batches; they come in stream order.

    Args:
        count: rows of the stream.
        most: rows to keep; all of them where there are no more.
        seed: of the draw.
        name: of the stream; streams of other names are sampled independently of it.
        share: first and last + 1 of the rows that are taken here, where several samplers share the stream; the whole
            stream if None.
        device: where the rows are kept; None for the CPU.

    Example:
        >>> import torch
        >>> sampler = RowSampler(10, 4, seed=0, name="target")
        >>> for batch in torch.arange(20.0).view(10, 2).split(3):
        ...     sampler.take(batch)
        >>> sampler.rows().shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        count: int,
        most: int,
        *,
        seed: int,
        name: str,
        share: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(most, bool) or most < 1:
            raise InputError(f"training_rows must be at least 1, got {most!r}")
        self._name = name
        self._first, self._last = share or (0, count)
        self._seen = self._first
        self._device = torch.device("cpu" if device is None else device)
        if count <= most:
            self._wanted = np.arange(self._first, self._last)
        else:
            wanted = np.sort(_random(seed, _SAMPLE, name).choice(count, most, replace=False, shuffle=False))
            self._wanted = wanted[slice(*np.searchsorted(wanted, (self._first, self._last)))]
        self._rows: torch.Tensor | None = None

    def take(self, batch: torch.Tensor) -> None:
        """Keep what is wanted of the next rows [n, D] of the stream; float64 is kept as float32."""
        first, last = np.searchsorted(self._wanted, (self._seen, self._seen + len(batch)))
        if self._rows is None:
            dtype = batch.dtype if batch.dtype in _KEPT_DTYPES else torch.float32
            self._rows = torch.empty(len(self._wanted), batch.shape[1], dtype=dtype, device=self._device)
        if last > first:
            picked = torch.from_numpy(self._wanted[first:last] - self._seen).to(batch.device)
            self._rows[first:last].copy_(batch[picked])
        self._seen += len(batch)

    def rows(self) -> torch.Tensor:
        """The sample [min(count, most), D], or this share of it, once the stream has ended."""
        if self._seen != self._last or self._rows is None:
            given, announced = self._seen - self._first, self._last - self._first
            raise InputError(f"{self._name} gave {given} rows where {announced} were announced")
        return self._rows


class TrainingRows:
    """Train and held-out rows in memory, drawn in batches that are a function of (seed, step).

    Batches run through random orders of the train rows, one order an epoch, and go on from one epoch to the next.
    Under torch.distributed every process holds all rows and takes its own share of each global batch.

    Attributes:
        train: [n, D].
        held_out: [h, D]: 5 % of the rows, at least 1, at most 8192.
        fingerprint: of the data and the sample.

    Example:
        >>> import torch
        >>> rows = TrainingRows.split(torch.randn(100, 4), name="target", fingerprint="demo", seed=0)
        >>> rows.train.shape, rows.held_out.shape, rows.batch(0, 32, seed=0).shape
        (torch.Size([95, 4]), torch.Size([5, 4]), torch.Size([32, 4]))
    """

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, *, name: str, fingerprint: str) -> None:
        self.train, self.held_out, self.name, self.fingerprint = train, held_out, name, fingerprint
        self._orders: dict[tuple[int, int], torch.Tensor] = {}

    @classmethod
    def sample(
        cls, rows: Rows, *, most: int = TRAINING_ROWS, seed: int = 0, device: torch.device | str | None = None
    ) -> TrainingRows:
        """At most ``most`` rows of a stream, in the stored dtype (float64 as float32), read once.

        Raises:
            InputError: fewer than two rows.
        """
        sampler = RowSampler(rows.count, most, seed=seed, name=rows.name, share=rows.share, device=device)
        for batch in rows.batches():
            sampler.take(batch)
        return cls.split(
            rows.gathered(sampler.rows()) if rows.count else torch.empty(0, rows.width),
            name=rows.name,
            fingerprint=f"{rows.fingerprint()}:{most}",
            seed=seed,
        )

    @classmethod
    def split(cls, sample: torch.Tensor, *, name: str, fingerprint: str, seed: int) -> TrainingRows:
        """Split rows [n, D] that are in memory already; ``fingerprint`` stands for them in checkpoints."""
        if len(sample) < 2:
            raise InputError(f"{name} has {len(sample)} rows: training needs at least 2, one of them held out")
        held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(sample))))
        order = torch.from_numpy(_random(seed, _SPLIT, name).permutation(len(sample))).to(sample.device)
        marked = hashlib.sha256(f"{fingerprint}:{seed}:{name}:{list(sample.shape)}:{sample.dtype}".encode()).hexdigest()
        return cls(
            sample[order[held_out:].sort().values],
            sample[order[:held_out].sort().values],
            name=name,
            fingerprint=marked,
        )

    def batch(self, step: int, batch_rows: int, seed: int) -> torch.Tensor:
        """This process's share [batch_rows / processes, D] of the global batch of a step."""
        return self.gather(self.positions(step, batch_rows, seed))

    def positions(self, step: int, batch_rows: int, seed: int) -> torch.Tensor:
        """Where the rows of that batch lie among ``train``."""
        check_batch_rows(batch_rows)
        first, last = share_of(batch_rows)
        return self._positions(step * batch_rows + first, step * batch_rows + last, seed)

    def gather(self, positions: torch.Tensor) -> torch.Tensor:
        """The rows at these positions."""
        return self.train[positions]

    def held_out_batches(self, batch_rows: int) -> Iterator[torch.Tensor]:
        """This process's share of the held-out rows, in order."""
        for chunk in self.held_out.split(batch_rows):
            first, last = share_of(len(chunk))
            if last > first:
                yield chunk[first:last]

    def _positions(self, first: int, last: int, seed: int) -> torch.Tensor:
        pieces, rows = [], len(self.train)
        while first < last:
            epoch, offset = divmod(first, rows)
            taken = min(rows - offset, last - first)
            pieces.append(self._order(seed, epoch)[offset : offset + taken])
            first += taken
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    def _order(self, seed: int, epoch: int) -> torch.Tensor:
        key = (seed, epoch)
        if key not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()
            order = _random(seed, _ORDER, self.name, epoch).permutation(len(self.train))
            self._orders[key] = torch.from_numpy(order).to(self.train.device)
        return self._orders[key]


class UnpairedRows:
    """Batches of two independent sets of rows: a batch is the tuple (source [n, D], target [n, D]).

    The held-out sets are walked side by side up to the end of the shorter one.
    """

    def __init__(self, source: TrainingRows, target: TrainingRows) -> None:
        if source.name == target.name:
            raise InputError(f"two sets of rows are both named {source.name!r}: they would be drawn alike")
        self.source, self.target = source, target
        self.fingerprint = f"{source.fingerprint}:{target.fingerprint}"

    def batch(self, step: int, batch_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's shares of the global batch of a step."""
        return self.gather(self.positions(step, batch_rows, seed))

    def positions(self, step: int, batch_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the rows of that batch lie among the rows of each side."""
        return self.source.positions(step, batch_rows, seed), self.target.positions(step, batch_rows, seed)

    def gather(self, positions: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows at these positions."""
        return self.source.gather(positions[0]), self.target.gather(positions[1])

    def held_out_batches(self, batch_rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Shares of equally many held-out rows of both sides."""
        rows = min(len(self.source.held_out), len(self.target.held_out))
        for start in range(0, rows, batch_rows):
            first, last = share_of(min(batch_rows, rows - start))
            if last > first:
                piece = slice(start + first, start + last)
                yield self.source.held_out[piece], self.target.held_out[piece]


def _random(seed: int, purpose: int, name: str, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, zlib.crc32(name.encode()), *more])

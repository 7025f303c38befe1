"""Corpus calibration of a conversion (METHOD D17): sums of every shard, kept as records, merged in the order of shards.

The sums of a shard are float64 and depend on that shard, the aligner and the batches alone, and the total is taken in
the order of the shards. So it is the same to the bit for any number of workers and wherever a run was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aniso_ext.convert.conversion import Conversion, named_errors
from aniso_ext.convert.device import check_device
from aniso_ext.convert.manifest import Manifest
from aniso_ext.convert.rows import UsableRows, bad_indices, magnitudes, refuse_bad
from aniso_ext.convert.shard import RowAligner
from aniso_ext.data import Shard
from aniso_ext.data.dtypes import array_dtype
from aniso_ext.data.shards import unusable

POLL_SECONDS = 1.0
"""How often a waiting worker looks for the sums of others."""


@runtime_checkable
class SummingAligner(RowAligner, Protocol):
    """An aligner that can be calibrated from sums of parts of a corpus; :class:`aniso_ext.align.Aligner` can."""

    @property
    def corpus_passes(self) -> int:
        """Passes over the corpus; 0 if there is no corpus mean."""

    def corpus_sums(self, batch: Any, number: int) -> np.ndarray:
        """Float64 sums [D] that rows [n, D] add to a pass."""

    def with_corpus_mean(self, mean: np.ndarray, number: int) -> RowAligner:
        """The aligner that holds the mean [D] of a pass."""


class CorpusCalibration:
    """The passes over a corpus before its conversion.

    Args:
        own: shards whose sums this worker takes.
        check_stop: called with (shards summed, shards to sum) before each shard.
        advance: called with the rows of each batch.
    """

    def __init__(
        self,
        conversion: Conversion,
        manifest: Manifest,
        own: list[int],
        check_stop: Callable[[int, int], None],
        advance: Callable[[int], None],
    ) -> None:
        self._conversion = conversion
        self._manifest = manifest
        self._own = own
        self._check_stop = check_stop
        self._advance = advance
        self._total = len(conversion.plan.targets)
        self.missing_sums = 0
        """Shards whose sums other workers have yet to take, where :meth:`run` gave up for them."""

    @property
    def passes(self) -> int:
        """How often each row is read for the calibration, as far as that is known."""
        aligner = self._conversion.aligner
        return aligner.corpus_passes if isinstance(aligner, SummingAligner) else 0

    def run(self, wait: bool) -> RowAligner | None:
        """The calibrated aligner; None where sums of other workers are missing and ``wait`` is False."""
        aligner = self._conversion.aligner
        if not isinstance(aligner, SummingAligner):
            return calibrate_at_once(self._conversion)
        calibrated: RowAligner = aligner
        for number in range(aligner.corpus_passes):
            assert isinstance(calibrated, SummingAligner)
            self._sum_own(calibrated, number)
            while missing := self._total - len(self._manifest.records.indices(_kind(number))):
                if not wait:
                    self.missing_sums = missing
                    return None
                self._check_stop(len(self._own), len(self._own))
                time.sleep(POLL_SECONDS)
            records = [self._record(number, index) for index in range(self._total)]
            calibrated = calibrated.with_corpus_mean(_mean(self._conversion, records), number)
        return calibrated

    def _sum_own(self, aligner: SummingAligner, number: int) -> None:
        present = self._manifest.records.indices(_kind(number))
        for done, index in enumerate(self._own):
            shard = self._conversion.plan.targets[index].shard
            if index in present:
                self._advance(shard.rows)
                continue
            self._check_stop(done, len(self._own))
            self._manifest.keep(_kind(number), index, _sums(self._conversion, aligner, shard, number, self._advance))

    def _record(self, number: int, index: int) -> dict[str, Any]:
        record = self._manifest.records.read(_kind(number), index) or {}
        sums = np.asarray(record.get("sums"))
        if sums.dtype != np.float64 or sums.shape != (self._conversion.embeddings.width,):
            reason = f"the sums of shard {index} are damaged"
            raise unusable(self._manifest.records.path, reason, "remove the folder and run again")
        return record


def calibrate_at_once(conversion: Conversion) -> RowAligner:
    """The aligner that a conversion uses, calibrated without its records; nothing is written."""
    aligner = conversion.aligner
    if conversion.calibration == "fitted":
        return aligner
    if not isinstance(aligner, SummingAligner):
        return aligner.calibrated(UsableRows(conversion.embeddings, conversion.on_bad), calibration="corpus")
    calibrated: RowAligner = aligner
    for number in range(aligner.corpus_passes):
        assert isinstance(calibrated, SummingAligner)
        records = [_sums(conversion, calibrated, target.shard, number) for target in conversion.plan.targets]
        calibrated = calibrated.with_corpus_mean(_mean(conversion, records), number)
    return calibrated


def _sums(
    conversion: Conversion,
    aligner: SummingAligner,
    shard: Shard,
    number: int,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Sums over the usable rows of a shard, and their number."""
    if conversion.machine.device is not None:
        check_device(str(conversion.machine.device))
    dtype = np.promote_types(shard.dtype, array_dtype(conversion.plan.stored_dtype))
    total, count, first_row = np.zeros(shard.width), 0, 0
    with named_errors(shard):
        for batch in shard.batches(0, shard.rows, conversion.batch_rows):
            found = magnitudes(batch)
            bad = bad_indices(found, batch.dtype.name)
            if conversion.on_bad == "fail":
                refuse_bad(shard, found, bad, first_row)
            usable = np.delete(batch, bad, axis=0) if len(bad) else batch
            if len(usable):
                sums = aligner.corpus_sums(conversion.placed(usable.astype(dtype, copy=False)), number)
                if not np.isfinite(sums).all():
                    reason = f"rows {first_row} to {first_row + len(batch) - 1} have stand-ins that are not finite"
                    raise unusable(shard.path or shard.name, reason, "check the aligner and the scale of the rows")
                total += sums
            count += len(usable)
            first_row += len(batch)
            if advance is not None:
                advance(len(batch))
    return {"rows": count, "sums": total.tolist()}


def _mean(conversion: Conversion, records: list[dict[str, Any]]) -> np.ndarray:
    """Mean [D] from the sums of all shards, in their order."""
    total = np.zeros(conversion.embeddings.width)
    for record in records:
        total += np.asarray(record["sums"])
    count = sum(int(record["rows"]) for record in records)
    if count == 0:
        reason = f"all {conversion.embeddings.rows} rows of the input are zero or not finite"
        raise unusable(conversion.plan.folder, reason, "there is no mean to calibrate on")
    return total / count


def _kind(number: int) -> str:
    return f"sums-{number}"

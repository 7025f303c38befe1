"""Is a finished conversion what it says it is? Every file, and the stand-ins of all rows or of a sample, made again."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.convert.conversion import Conversion, Machine, check_choice, prepare
from aniso_ext.convert.corpus import calibrate_at_once
from aniso_ext.convert.digest import NAME as HASH
from aniso_ext.convert.digest import shard_digest
from aniso_ext.convert.lines import CALIBRATED, read_recorded
from aniso_ext.convert.plan import Target
from aniso_ext.convert.rows import bad_rows
from aniso_ext.convert.shard import RowAligner, ShardConverter
from aniso_ext.convert.workers import Worker
from aniso_ext.data import Shard, open_embeddings
from aniso_ext.data.locations import Location
from aniso_ext.data.shards import MemoryShard, unusable
from aniso_ext.errors import DataError, StoppedError

ROWS = ("all", "sample")
SAMPLED_BATCHES = 8
"""Evenly spaced batches of each shard that are made again for ``sample``."""
_REMEDY = "remove the file and convert again, which makes it anew"


@dataclass(frozen=True)
class VerificationReport:
    """Result of :func:`verify_conversion`, which raises at the first difference.

    Attributes:
        shards: output files that were read and whose hashes are right.
        rows: rows in them.
        checked_rows: rows whose stand-ins were made again and are the same to the bit.
        seconds: wall time.
        manifest: path of the manifest.
    """

    shards: int
    rows: int
    checked_rows: int
    seconds: float
    manifest: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return asdict(self)


def verify_conversion(
    aligner: RowAligner,
    input: Any,
    output: str | os.PathLike[str],
    *,
    rows: str = "all",
    batch_rows: int | None = None,
    calibration: str = "fitted",
    on_bad: str = "fail",
    dtype: Any = None,
    format: str | None = None,
    kind: str | None = None,
    column: str | None = None,
    memory: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    worker: Worker | tuple[int, int] | None = None,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerificationReport:
    """Check a finished conversion against its manifest, its input and its aligner.

    Of every output file: rows, width, dtype, size and hash. Of its rows: the stand-ins are made again by the code
    that converts, in the same batches, and their bytes are compared.

    Args:
        rows: ``all``, or a ``sample`` of evenly spaced batches of each shard.
        worker: (rank, number of workers): check the shards of one worker.
        stop: asked before each shard; once it says True, the run ends with :class:`StoppedError`.

    The other arguments are those of :func:`convert_embeddings`, as they were when the files were made.

    Raises:
        DataError: the first difference, with the file and, where it is one, the row.

    Example:
        >>> import numpy as np, tempfile
        >>> from aniso_ext.align import make_aligner
        >>> from aniso_ext.convert import convert_embeddings
        >>> rows = np.eye(4, dtype=np.float32)
        >>> aligner, output = make_aligner("identity").fit(rows, rows), tempfile.mkdtemp() + "/out.npy"
        >>> _ = convert_embeddings(aligner, rows, output)
        >>> verify_conversion(aligner, rows, output).checked_rows
        4
    """
    started = time.perf_counter()
    check_choice("rows", rows, ROWS)
    me = Worker.of(worker)
    machine = Machine(memory, device, threads)
    conversion = prepare(
        aligner,
        input,
        output,
        batch_rows=batch_rows,
        calibration=calibration,
        on_bad=on_bad,
        dtype=dtype,
        format=format,
        kind=kind,
        column=column,
        machine=machine,
    )
    plan = conversion.plan
    header, lines = read_recorded(plan, conversion.header())
    missing = [target.path for index, target in enumerate(plan.targets) if index not in lines]
    if missing:
        reason = f"is one of {len(missing)} shards of {len(plan.targets)} that are not finished"
        raise unusable(missing[0], reason, "run the conversion again to go on, then verify")
    own = me.share(conversion.shard_rows())
    check = _Check(conversion, rows, stop, progress, sum(plan.targets[index].shard.rows for index in own))
    for index in own:
        _check_stop(stop)
        _check_file(plan.targets[index], plan.stored_dtype, lines[index])
    if own:
        calibrated = calibrate_at_once(conversion)
        if calibrated.fingerprint() != header.get(CALIBRATED):
            reason = "was made with another corpus mean than the input has now"
            raise unusable(plan.manifest, reason, "convert again with on_existing='overwrite'")
        check.execute(calibrated, [(plan.targets[index], lines[index]) for index in own])
    finished = sum(lines[index]["rows"] for index in own)
    return VerificationReport(
        len(own), finished, check.checked, time.perf_counter() - started, str(plan.manifest)
    )


def _check_stop(stop: Callable[[], bool] | None) -> None:
    if stop is not None and stop():
        raise StoppedError("stopped before all shards were verified: nothing wrong was found so far")


def _check_file(target: Target, stored_dtype: str, line: dict[str, Any]) -> None:
    """Compare a file with its line in the manifest."""
    path = target.path
    if not path.is_file():
        raise unusable(path, "is in the manifest but not there", "convert again, which makes it anew")
    shard = _opened(path)
    checks: dict[str, tuple[Callable[[], Any], Any]] = {
        "rows": (lambda: shard.rows, line.get("rows")),
        "width": (lambda: shard.width, target.shard.width),
        "dtype": (lambda: shard.stored_dtype, stored_dtype),
        "bytes": (lambda: path.stat().st_size, line.get("bytes")),
        HASH: (lambda: shard_digest(shard), line.get(HASH)),
    }
    for key, (find, wanted) in checks.items():
        if (value := find()) != wanted:
            raise unusable(path, f"has {key} {value}, it should be {wanted}", _REMEDY)


def _opened(path: Location) -> Shard:
    try:
        return open_embeddings(path).shards[0]
    except DataError as error:
        raise DataError(f"{error}; {_REMEDY}") from None


@dataclass
class _Check:
    """Stand-ins made again and compared."""

    conversion: Conversion
    rows: str
    stop: Callable[[], bool] | None
    progress: Callable[[int, int], None] | None
    total: int
    checked: int = 0
    seen: int = 0

    def execute(self, calibrated: RowAligner, shards: list[tuple[Target, dict[str, Any]]]) -> None:
        with tempfile.TemporaryDirectory() as folder, self.conversion.converter(calibrated) as converter:
            for target, line in shards:
                _check_stop(self.stop)
                again = replace(target, path=Path(folder) / target.name)
                self._check_shard(converter, target, again, np.asarray(line["bad_rows"], np.int64))

    def _check_shard(self, converter: ShardConverter, target: Target, again: Target, bad: np.ndarray) -> None:
        dropping = self.conversion.on_bad == "drop"
        output = _opened(target.path)
        for first_row, batch, chosen in self._batches(target.shard):
            inside = bad[(bad >= first_row) & (bad < first_row + len(batch))] - first_row
            _check_bad(target.shard, bad_rows(batch), inside, first_row)
            kept = len(batch) - len(inside) * dropping
            if chosen and kept:
                start = first_row - int(np.searchsorted(bad, first_row)) * dropping
                converter.convert(replace(again, shard=_piece(target.shard, batch)), _ignore)
                _compare(output, start, _opened(again.path))
                self.checked += kept
            self.seen += len(batch)
            if self.progress is not None:
                self.progress(self.seen, self.total)

    def _batches(self, shard: Shard) -> Iterator[tuple[int, np.ndarray, bool]]:
        """First row, rows, and whether their stand-ins are to be compared, in the batches of the conversion."""
        size = self.conversion.piece_rows()
        number = -(-shard.rows // size)
        sample = set(np.linspace(0, number - 1, SAMPLED_BATCHES).astype(int).tolist())
        first_row = 0
        for index, batch in enumerate(shard.batches(0, shard.rows, size)):
            yield first_row, batch, self.rows == "all" or index in sample
            first_row += len(batch)


def _piece(shard: Shard, batch: np.ndarray) -> Shard:
    return MemoryShard(shard.name, None, "memory", len(batch), shard.width, shard.stored_dtype, batch)


def _check_bad(shard: Shard, found: np.ndarray, recorded: np.ndarray, first_row: int) -> None:
    if not np.array_equal(found, recorded):
        row = first_row + int(np.setxor1d(found, recorded)[0])
        reason = f"row {row} is bad in the input or in the manifest, but not in both"
        raise unusable(shard.path or shard.name, reason, "convert again with on_existing='overwrite'")


def _compare(output: Shard, start: int, again: Shard) -> None:
    """Compare rows of the output from ``start`` on with those that were made again, byte by byte."""
    wanted = np.concatenate(list(again.batches(0, again.rows, again.rows)))
    found = np.concatenate(list(output.batches(start, start + len(wanted), len(wanted))))
    differing = (found.view(np.uint8) != wanted.view(np.uint8)).reshape(*found.shape, -1).any(axis=2)
    if differing.any():
        row, column = (int(indices[0]) for indices in np.nonzero(differing))
        reason = (
            f"row {start + row} is not the stand-in of its input row "
            f"(column {column} is {found[row, column]:.6g}, it should be {wanted[row, column]:.6g})"
        )
        raise unusable(output.path, reason, _REMEDY)


def _ignore(rows: int) -> None:
    """Progress of a piece, which counts when it has been compared."""

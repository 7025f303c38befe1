"""What a conversion would do: its shards, sizes and shares, what is done already, and how long the rest would take."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.convert.conversion import Conversion, Machine, prepare
from aniso_ext.convert.corpus import SummingAligner
from aniso_ext.convert.lines import fits, read_recorded
from aniso_ext.convert.rows import bad_rows
from aniso_ext.convert.shard import RowAligner
from aniso_ext.convert.workers import Worker, shares
from aniso_ext.data import open_embeddings
from aniso_ext.data.dtypes import item_bytes
from aniso_ext.data.shards import MemoryShard

TIMED_BATCHES = 4


@dataclass(frozen=True)
class ConversionPlan:
    """Result of :func:`preview_conversion`.

    Attributes:
        shards, rows: of the input.
        bytes_in, bytes_out: numbers as stored, without headers.
        dtype: stored dtype of the output.
        outputs: paths of the output files.
        manifest: path of the manifest.
        batch_rows: rows per batch.
        worker, workers: rank of this process and number of workers.
        share_shards, share_rows: shards and rows of each worker.
        done_shards: shards that an earlier run has finished.
        rows_left: rows of this worker that are still to be converted.
        rows_per_second: measured on a few batches, read from memory and written to a temporary file.
        seconds_left: for the rows of this worker, all passes of a corpus calibration included.
    """

    shards: int
    rows: int
    bytes_in: int
    bytes_out: int
    dtype: str
    outputs: tuple[str, ...]
    manifest: str
    batch_rows: int
    worker: int
    workers: int
    share_shards: tuple[int, ...]
    share_rows: tuple[int, ...]
    done_shards: int
    rows_left: int
    rows_per_second: float
    seconds_left: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def preview_conversion(
    aligner: RowAligner,
    input: Any,
    output: str | os.PathLike[str],
    *,
    batch_rows: int | None = None,
    calibration: str = "fitted",
    on_existing: str = "resume",
    on_bad: str = "fail",
    dtype: Any = None,
    format: str | None = None,
    kind: str | None = None,
    column: str | None = None,
    memory: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    worker: Worker | tuple[int, int] | None = None,
) -> ConversionPlan:
    """The plan of the conversion that ``convert_embeddings`` with the same arguments would make; nothing is written.

    The estimate comes from converting a few batches into the folder for temporary files, after one to warm up.

    Raises:
        InputError, DataError: what the conversion would refuse at its start.

    Example:
        >>> import numpy as np
        >>> from aniso_ext.align import make_aligner
        >>> rows = np.eye(4, dtype=np.float32)
        >>> preview_conversion(make_aligner("identity").fit(rows, rows), rows, "out.npy").bytes_out
        64
    """
    me = Worker.of(worker)
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
        machine=Machine(memory, device, threads),
    )
    plan, rows = conversion.plan, conversion.shard_rows()
    recorded = {} if on_existing == "overwrite" else read_recorded(plan, conversion.header())[1]
    done = {index for index, line in recorded.items() if fits(plan, index, line)}
    shared = shares(rows, me.world)
    left = sum(rows[index] for index in shared[me.rank] if index not in done)
    rate = _measured_rate(conversion)
    embeddings = conversion.embeddings
    return ConversionPlan(
        shards=len(rows),
        rows=embeddings.rows,
        bytes_in=sum(shard.nbytes for shard in embeddings.shards),
        bytes_out=embeddings.rows * embeddings.width * item_bytes(plan.stored_dtype),
        dtype=plan.stored_dtype,
        outputs=tuple(str(target.path) for target in plan.targets),
        manifest=str(plan.manifest),
        batch_rows=conversion.batch_rows,
        worker=me.rank,
        workers=me.world,
        share_shards=tuple(map(len, shared)),
        share_rows=tuple(sum(rows[index] for index in indices) for indices in shared),
        done_shards=len(done),
        rows_left=left,
        rows_per_second=rate,
        seconds_left=left * _readings(conversion) / rate,
    )


def _readings(conversion: Conversion) -> int:
    """How often a row is read and mapped."""
    if conversion.calibration == "fitted":
        return 1
    aligner = conversion.aligner
    return 1 + (aligner.corpus_passes if isinstance(aligner, SummingAligner) else 1)


def _measured_rate(conversion: Conversion) -> float:
    """Rows a second of the first batches of the input, bad rows left out."""
    shard = conversion.embeddings.shards[0]
    rows = min(shard.rows, TIMED_BATCHES * conversion.batch_rows)
    sample = np.concatenate(list(shard.batches(0, rows, conversion.batch_rows)))
    usable = np.delete(sample, bad_rows(sample), axis=0)
    if not len(usable):
        return float("nan")
    aligner: RowAligner = conversion.aligner
    if conversion.calibration == "corpus":
        aligner = aligner.calibrated(open_embeddings(usable), calibration="corpus")
    with tempfile.TemporaryDirectory() as folder:
        _seconds(conversion, aligner, usable[: conversion.batch_rows], folder)
        return len(usable) / _seconds(conversion, aligner, usable, folder)


def _seconds(conversion: Conversion, aligner: RowAligner, rows: np.ndarray, folder: str) -> float:
    target = conversion.plan.targets[0]
    shard = target.shard
    piece = MemoryShard(shard.name, None, "memory", len(rows), shard.width, shard.stored_dtype, rows)
    started = time.perf_counter()
    with conversion.converter(aligner) as converter:
        converter.convert(replace(target, path=Path(folder) / target.name, shard=piece), _ignore)
    return time.perf_counter() - started


def _ignore(rows: int) -> None:
    """Progress that nobody watches."""

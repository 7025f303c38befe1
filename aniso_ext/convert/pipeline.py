"""Conversion of an embedding set, shard by shard, by one process or by many."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aniso_ext.convert.conversion import Conversion, Machine, check_choice, named_errors, prepare
from aniso_ext.convert.corpus import CorpusCalibration
from aniso_ext.convert.inputs import warn_of_norms
from aniso_ext.convert.manifest import Manifest
from aniso_ext.convert.metadata import check_metadata, copy_metadata
from aniso_ext.convert.report import ConversionReport
from aniso_ext.convert.shard import RowAligner
from aniso_ext.convert.workers import Worker
from aniso_ext.errors import InputError, StoppedError

ON_EXISTING = ("resume", "overwrite", "fail")
Progress = Callable[[int, int], None]


def convert_embeddings(
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
    wait: bool = False,
    stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the stand-ins of a set of source embeddings, one output shard for each input shard.

    Every shard is written to a temporary file, synced and renamed, then recorded in ``manifest.jsonl`` (rows, bytes,
    hash, aligner). A run that was stopped at any point resumes with the shards that are not recorded and ends with
    the same bytes, manifest included, as an unbroken one. Memory is a few batches.

    Several processes may share a conversion, on one machine or on many that see the same folders: each is called with
    a ``worker`` of its own and otherwise the same arguments. Whatever their number and the order in which they end,
    the bytes are the same. Whoever finishes the last shard completes the manifest.

    Args:
        aligner: a fitted aligner.
        input: anything that :func:`aniso_ext.data.open_embeddings` takes, together with ``kind`` and ``column``.
        output: a folder (shards keep their names and formats), or for a single shard also a file. An input that was
            opened as the root of a clip-retrieval folder goes to the same half of ``output``, its metadata with it.
        batch_rows: rows per batch, by default 8192; part of the manifest, because results may depend on it in the last
            bit.
        calibration: ``fitted`` (one pass) or ``corpus`` (first takes the corpus mean from the input; METHOD D17). A
            resumed corpus run takes over the sums of the shards that were read, and must arrive at the same aligner.
        on_existing: ``resume`` an earlier run of the same conversion, ``overwrite`` it, or ``fail``.
        on_bad: ``fail`` at the first row that is zero or not finite, ``drop`` such rows, or write ``zero`` rows.
        dtype: stored dtype of the output; by default that of the input. With a wider one, rows are mapped in it.
        format: ``npy``, ``parquet``, ``safetensors`` or ``arrow``; by default that of the input. Tables keep their
            other columns in a table.
        memory: bytes that the pipeline may take, beside what Python and its libraries take. Without ``batch_rows`` it
            decides them: the largest power of two up to 8192 that fits.
        device: where rows are mapped, such as ``cuda``; by default the CPU, or the device of the aligner. Its kind is
            part of the manifest, as results differ in the last bits.
        threads: of the operations on the CPU; by default PyTorch's.
        worker: (rank, number of workers) of this process; by default it is alone. Workers can only resume.
        wait: with a corpus calibration, wait for the sums of other workers; by default the worker ends where it needs
            them (``missing_sums`` of the report) and goes on when it is called again.
        stop: asked before each shard; once it says True, the run ends with :class:`StoppedError`.
        progress: called with (rows done, rows of this worker) after each batch; a corpus calibration reads rows more
            than once and counts them each time.

    Returns:
        A :class:`ConversionReport`; where other workers have shards left, of the shards that are finished.

    Raises:
        InputError: the widths of aligner and input differ (both are named), or an option is impossible.
        DataError: an input or output file cannot be used, a row is bad, or a resume does not fit what is there (both
            fingerprints are named). The shard at hand leaves nothing behind; finished ones stay for a resume.
        StoppedError: ``stop`` said so.

    Warns:
        UserWarning: rows are not normalised as those were that the aligner was fitted on.

    Example:
        >>> import numpy as np, tempfile
        >>> from aniso_ext.align import make_aligner
        >>> rows = np.eye(4, dtype=np.float32)
        >>> report = convert_embeddings(make_aligner("identity").fit(rows, rows), rows, tempfile.mkdtemp() + "/out.npy")
        >>> report.rows, report.shards
        (4, 1)
    """
    started = time.perf_counter()
    check_choice("on_existing", on_existing, ON_EXISTING)
    me = Worker.of(worker)
    if me.world > 1 and on_existing != "resume":
        raise InputError(
            f"on_existing={on_existing!r} would undo what other workers have finished: remove the output before the "
            "first worker starts, and let all of them resume"
        )
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
    check_metadata(conversion.plan, on_existing, on_bad)
    warn_of_norms(aligner, conversion.embeddings)
    header = conversion.header()
    with Manifest(conversion.plan, header, on_existing, me) as manifest:
        run = _Run(conversion, manifest, me, stop or _never, progress)
        run.execute(wait)
        lines = manifest.finished()
        if len(lines) == len(conversion.plan.targets):
            copy_metadata(conversion.plan)
    return _report(run, header, lines, time.perf_counter() - started)


def _never() -> bool:
    return False


def _report(
    run: _Run, header: dict[str, Any], lines: dict[int, dict[str, Any]], seconds: float
) -> ConversionReport:
    plan = run.conversion.plan
    indices = {plan.targets[index].shard.name: line["bad_rows"] for index, line in lines.items() if line["bad_rows"]}
    return ConversionReport(
        rows=sum(line["rows"] for line in lines.values()),
        shards=len(lines),
        bytes=sum(line["bytes"] for line in lines.values()),
        seconds=seconds,
        outputs=tuple(str(plan.targets[index].path) for index in lines),
        manifest=str(plan.manifest),
        resumed_shards=run.resumed,
        aligner=header["aligner"],
        input=header["input"],
        dtype=plan.stored_dtype,
        calibration=header["calibration"],
        bad_rows=sum(map(len, indices.values())),
        bad_row_indices=indices,
        worker=run.worker.rank,
        workers=run.worker.world,
        missing_shards=len(plan.targets) - len(lines),
        missing_sums=run.missing_sums,
    )


@dataclass
class _Run:
    """The part of one worker in a conversion."""

    conversion: Conversion
    manifest: Manifest
    worker: Worker
    stop: Callable[[], bool]
    progress: Progress | None
    resumed: int = field(default=0, init=False)
    missing_sums: int = field(default=0, init=False)
    done: int = field(default=0, init=False)
    total: int = field(default=0, init=False)

    def execute(self, wait: bool) -> None:
        conversion, rows = self.conversion, self.conversion.shard_rows()
        finished = self.manifest.finished()
        own = self.worker.share(rows)
        left = [index for index in own if index not in finished]
        self.resumed = len(own) - len(left)
        self.total = sum(rows[index] for index in own)
        if len(finished) == len(rows):
            return
        aligner: RowAligner | None = conversion.aligner
        if conversion.calibration == "corpus":
            calibration = CorpusCalibration(conversion, self.manifest, own, self._check_stop, self._advance)
            self.total *= 1 + calibration.passes
            aligner = calibration.run(wait and bool(left))
            self.missing_sums = calibration.missing_sums
        if aligner is None or not left:
            return
        self.manifest.start(aligner.fingerprint())
        self._advance(sum(rows[index] for index in own if index in finished))
        self._convert(aligner, left, len(own))

    def _convert(self, aligner: RowAligner, left: list[int], shards: int) -> None:
        fingerprint = self.conversion.aligner.fingerprint()
        with self.conversion.converter(aligner) as converter:
            for number, index in enumerate(left):
                self._check_stop(shards - len(left) + number, shards)
                target = self.conversion.plan.targets[index]
                with named_errors(target.shard):
                    line = converter.convert(target, self._advance)
                self.manifest.add(index, {**line, "aligner": fingerprint})

    def _check_stop(self, finished: int, shards: int) -> None:
        if self.stop():
            raise StoppedError(f"stopped after {finished} of {shards} shards: run the same command again to go on")

    def _advance(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.total)

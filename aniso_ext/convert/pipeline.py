"""Conversion of an embedding set, shard by shard."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aniso_ext.convert.manifest import Manifest
from aniso_ext.convert.metadata import check_metadata, copy_metadata
from aniso_ext.convert.plan import Plan, plan_outputs
from aniso_ext.convert.report import ConversionReport
from aniso_ext.convert.rows import UsableRows
from aniso_ext.convert.shard import RowAligner, ShardConverter
from aniso_ext.data import EmbeddingSet, open_embeddings
from aniso_ext.data.dtypes import stored_name
from aniso_ext.errors import InputError

CALIBRATIONS = ("fitted", "corpus")
ON_EXISTING = ("resume", "overwrite", "fail")
ON_BAD = ("fail", "drop", "zero")
Progress = Callable[[int, int], None]


def convert_embeddings(
    aligner: RowAligner,
    input: Any,
    output: str | os.PathLike[str],
    *,
    batch_rows: int = 8192,
    calibration: str = "fitted",
    on_existing: str = "resume",
    on_bad: str = "fail",
    dtype: Any = None,
    format: str | None = None,
    kind: str | None = None,
    column: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the stand-ins of a set of source embeddings, one output shard for each input shard.

    Every shard is written to a temporary file, synced and renamed, then recorded in ``manifest.jsonl`` (rows, bytes,
    hash, aligner). A run that was stopped at any point resumes after the last recorded shard and ends with the same
    bytes, manifest included, as an unbroken one. Memory is a few batches.

    Args:
        aligner: a fitted aligner.
        input: anything that :func:`aniso_ext.data.open_embeddings` takes, together with ``kind`` and ``column``.
        output: a folder (shards keep their names and formats), or for a single shard also a file. An input that was
            opened as the root of a clip-retrieval folder goes to the same half of ``output``, its metadata with it.
        batch_rows: rows per batch; part of the manifest, because results may depend on it in the last bit.
        calibration: ``fitted`` (one pass) or ``corpus`` (first takes the corpus mean from the input; METHOD D17). A
            resumed corpus run repeats that first pass and must arrive at the same aligner.
        on_existing: ``resume`` an earlier run of the same conversion, ``overwrite`` it, or ``fail``.
        on_bad: ``fail`` at the first row that is zero or not finite, ``drop`` such rows, or write ``zero`` rows.
        dtype: stored dtype of the output; by default that of the input. With a wider one, rows are mapped in it.
        format: ``npy``, ``parquet``, ``safetensors`` or ``arrow``; by default that of the input. Tables keep their
            other columns in a table.
        progress: called with (rows done, rows in all) after each batch.

    Returns:
        A :class:`ConversionReport`.

    Raises:
        InputError: the widths of aligner and input differ (both are named), or an option is impossible.
        DataError: an input or output file cannot be used, a row is bad, or a resume does not fit what is there (both
            fingerprints are named). The shard at hand leaves nothing behind; finished ones stay for a resume.

    Example:
        >>> import numpy as np, tempfile
        >>> from aniso_ext.align import make_aligner
        >>> rows = np.eye(4, dtype=np.float32)
        >>> report = convert_embeddings(make_aligner("identity").fit(rows, rows), rows, tempfile.mkdtemp() + "/out.npy")
        >>> report.rows, report.shards
        (4, 1)
    """
    started = time.perf_counter()
    _check_choice("calibration", calibration, CALIBRATIONS)
    _check_choice("on_existing", on_existing, ON_EXISTING)
    _check_choice("on_bad", on_bad, ON_BAD)
    if isinstance(batch_rows, bool) or not isinstance(batch_rows, (int, np.integer)) or batch_rows < 1:
        raise InputError(f"batch_rows must be a positive integer, got {batch_rows!r}")
    embeddings = open_embeddings(input, kind=kind, column=column)
    if embeddings.width != aligner.width:
        raise InputError(
            f"the input has width {embeddings.width}, but the aligner was fitted at width {aligner.width}: "
            "use embeddings of the encoder it was fitted on"
        )
    if embeddings.rows == 0:
        raise InputError("the input has no rows: there is nothing to convert")
    stored_dtype = embeddings.stored_dtype if dtype is None else stored_name(dtype)
    plan = plan_outputs(embeddings, output, stored_dtype, format)
    check_metadata(plan, on_existing, on_bad)
    header = {
        "aligner": aligner.fingerprint(),
        "input": embeddings.fingerprint(),
        "rows": embeddings.rows,
        "width": embeddings.width,
        "shards": len(plan.targets),
        "dtype": plan.stored_dtype,
        "calibration": calibration,
        "on_bad": on_bad,
        "batch_rows": int(batch_rows),
    }
    with Manifest(plan, header, on_existing) as manifest:
        resumed = len(manifest.finished)
        if resumed < len(plan.targets):
            run = _Run(aligner, embeddings, plan, manifest, int(batch_rows), calibration, on_bad, progress)
            run.execute()
        copy_metadata(plan)
        lines = manifest.finished
    return _report(plan, header, lines, resumed, time.perf_counter() - started)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _report(
    plan: Plan, header: dict[str, Any], lines: list[dict[str, Any]], resumed: int, seconds: float
) -> ConversionReport:
    indices = {target.shard.name: line["bad_rows"] for target, line in zip(plan.targets, lines, strict=True)}
    indices = {name: found for name, found in indices.items() if found}
    return ConversionReport(
        rows=sum(line["rows"] for line in lines),
        shards=len(lines),
        bytes=sum(line["bytes"] for line in lines),
        seconds=seconds,
        outputs=tuple(str(target.path) for target in plan.targets),
        manifest=str(plan.manifest),
        resumed_shards=resumed,
        aligner=header["aligner"],
        input=header["input"],
        dtype=plan.stored_dtype,
        calibration=header["calibration"],
        bad_rows=sum(map(len, indices.values())),
        bad_row_indices=indices,
    )


@dataclass
class _Run:
    """One conversion in progress."""

    aligner: RowAligner
    embeddings: EmbeddingSet
    plan: Plan
    manifest: Manifest
    batch_rows: int
    calibration: str
    on_bad: str
    progress: Progress | None
    done: int = field(default=0, init=False)

    def execute(self) -> None:
        fingerprint = self.aligner.fingerprint()
        if self.calibration == "corpus":
            self.aligner = self.aligner.calibrated(UsableRows(self.embeddings, self.on_bad), calibration="corpus")
        self.manifest.start(self.aligner.fingerprint())
        converter = ShardConverter(self.aligner, self.plan.stored_dtype, self.batch_rows, self.on_bad)
        first = len(self.manifest.finished)
        self._advance(sum(target.shard.rows for target in self.plan.targets[:first]))
        for target in self.plan.targets[first:]:
            line = converter.convert(target, self._advance)
            self.manifest.add({**line, "aligner": fingerprint})

    def _advance(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.embeddings.rows)

"""What a conversion is: its input, its outputs and every option that its bytes depend on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aniso_ext.convert.plan import Plan, plan_outputs
from aniso_ext.convert.shard import RowAligner, ShardConverter
from aniso_ext.data import EmbeddingSet, open_embeddings
from aniso_ext.data.dtypes import stored_name
from aniso_ext.errors import InputError

CALIBRATIONS = ("fitted", "corpus")
ON_BAD = ("fail", "drop", "zero")
BATCH_ROWS = 8192


@dataclass(frozen=True)
class Machine:
    """How the machine is used; see :func:`aniso_ext.convert.convert_embeddings`."""

    memory: int | None = None
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Conversion:
    """One conversion, checked, before anything is written."""

    aligner: RowAligner
    embeddings: EmbeddingSet
    plan: Plan
    batch_rows: int
    calibration: str
    on_bad: str
    machine: Machine

    def header(self) -> dict[str, Any]:
        """What the bytes of the output depend on; the first line of the manifest."""
        return {
            "aligner": self.aligner.fingerprint(),
            "input": self.embeddings.fingerprint(),
            "rows": self.embeddings.rows,
            "width": self.embeddings.width,
            "shards": len(self.plan.targets),
            "dtype": self.plan.stored_dtype,
            "calibration": self.calibration,
            "on_bad": self.on_bad,
            "batch_rows": self.batch_rows,
        }

    def converter(self, calibrated: RowAligner) -> ShardConverter:
        """What converts the shards, given the aligner whose calibration is done."""
        return ShardConverter(calibrated, self.plan.stored_dtype, self.batch_rows, self.on_bad)

    def shard_rows(self) -> list[int]:
        """Rows of every input shard."""
        return [target.shard.rows for target in self.plan.targets]


def prepare(
    aligner: RowAligner,
    input: Any,
    output: str | os.PathLike[str],
    *,
    batch_rows: int | None,
    calibration: str,
    on_bad: str,
    dtype: Any,
    kind: str | None,
    column: str | None,
    machine: Machine,
) -> Conversion:
    """Check the options and open the input; the arguments are those of ``convert_embeddings``.

    Raises:
        InputError, DataError: as ``convert_embeddings``.
    """
    check_choice("calibration", calibration, CALIBRATIONS)
    check_choice("on_bad", on_bad, ON_BAD)
    embeddings = open_embeddings(input, kind=kind, column=column)
    if embeddings.width != aligner.width:
        raise InputError(
            f"the input has width {embeddings.width}, but the aligner was fitted at width {aligner.width}: "
            "use embeddings of the encoder it was fitted on"
        )
    if embeddings.rows == 0:
        raise InputError("the input has no rows: there is nothing to convert")
    plan = plan_outputs(embeddings, Path(output), embeddings.stored_dtype if dtype is None else stored_name(dtype))
    return Conversion(aligner, embeddings, plan, _batch_rows(batch_rows), calibration, on_bad, machine)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of its choices."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _batch_rows(given: Any) -> int:
    if given is None:
        return BATCH_ROWS
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
        raise InputError(f"batch_rows must be a positive integer, got {given!r}")
    return int(given)

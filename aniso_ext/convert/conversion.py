"""What a conversion is: its input, its outputs and every option that its bytes depend on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from aniso_ext.convert.inputs import check_encoder
from aniso_ext.convert.maps import DEVICE_ROWS
from aniso_ext.convert.memory import BATCH_ROWS, batch_rows_within
from aniso_ext.convert.plan import Plan, plan_outputs
from aniso_ext.convert.shard import RowAligner, ShardConverter
from aniso_ext.data import EmbeddingSet, Shard, open_embeddings
from aniso_ext.data.dtypes import stored_name
from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError

CALIBRATIONS = ("fitted", "corpus")
ON_BAD = ("fail", "drop", "zero")


@dataclass(frozen=True)
class Machine:
    """How the machine is used.

    Attributes:
        memory: bytes that the pipeline may take, beside what Python and its libraries take.
        device: where rows are mapped, e.g. ``cuda``; None leaves it to the aligner.
        threads: of the operations on the CPU; None leaves it to PyTorch.
    """

    memory: int | None = None
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("memory", self.memory), ("threads", self.threads)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.device is not None and re.fullmatch(r"cpu|cuda(:\d{1,3})?", str(self.device)) is None:
            raise InputError(f"device must be cpu, cuda or cuda:N, got {str(self.device)!r}")

    def device_kind(self) -> str:
        """``cpu``, ``cuda`` or another kind of device: results differ between them in the last bits."""
        return "cpu" if self.device is None else str(self.device).partition(":")[0]


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
        header = {
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
        device = self.machine.device_kind()
        return header if device == "cpu" else {**header, "device": device}

    def converter(self, calibrated: RowAligner) -> ShardConverter:
        """What converts the shards, given the aligner whose calibration is done."""
        return ShardConverter(
            calibrated,
            self.plan.stored_dtype,
            self.batch_rows,
            self.on_bad,
            memory=self.machine.memory,
            device=self.machine.device,
            threads=self.machine.threads,
        )

    def placed(self, batch: np.ndarray) -> Any:
        """A batch as a tensor on the device of this conversion; as it is where none was named."""
        if self.machine.device is None:
            return batch
        import torch

        return torch.from_numpy(batch).to(self.machine.device)

    def piece_rows(self) -> int:
        """Rows of the pieces of a shard whose stand-ins are the same to the bit when they are made apart."""
        if self.machine.device_kind() == "cpu":
            return self.batch_rows
        return -(-self.batch_rows // DEVICE_ROWS) * DEVICE_ROWS

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
    format: str | None,
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
    plan = plan_outputs(embeddings, output, embeddings.stored_dtype if dtype is None else stored_name(dtype), format)
    check_encoder(aligner, embeddings)
    rows = _batch_rows(batch_rows)
    if machine.memory is not None:
        rows = batch_rows_within(plan, machine.memory, rows)
    return Conversion(aligner, embeddings, plan, rows or BATCH_ROWS, calibration, on_bad, machine)


@contextmanager
def named_errors(shard: Shard) -> Iterator[None]:
    """Errors of the operating system that do not name a file, as errors that do."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be read, or its output not written ({error.strerror or error})"
        raise unusable(shard.path or shard.name, reason, "check the disk and run again to resume") from None


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of its choices."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _batch_rows(given: Any) -> int | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)) or given < 1:
        raise InputError(f"batch_rows must be a positive integer, got {given!r}")
    return int(given)

"""What a conversion did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ConversionReport:
    """Result of :func:`aniso_ext.convert.convert_embeddings`.

    Attributes:
        rows: rows in the output, of all shards that are finished.
        shards: output files that are finished.
        bytes: their size together.
        seconds: wall time of this run.
        outputs: paths of the output files, in the order of the input.
        manifest: path of the manifest.
        resumed_shards: shards of this worker that an earlier run had finished.
        aligner, input: fingerprints.
        dtype: stored dtype of the output.
        calibration: ``fitted`` or ``corpus``.
        bad_rows: number of input rows that were dropped or zeroed.
        bad_row_indices: their indices within each input shard, by shard name; only shards that have any.
        worker, workers: rank of this process and number of workers.
        missing_shards: shards that are not finished yet.
        missing_sums: shards whose sums for the corpus calibration other workers have yet to take; the worker has then
            converted nothing, and goes on when it is called again.
    """

    rows: int
    shards: int
    bytes: int
    seconds: float
    outputs: tuple[str, ...]
    manifest: str
    resumed_shards: int
    aligner: str
    input: str
    dtype: str
    calibration: str
    bad_rows: int
    bad_row_indices: dict[str, list[int]]
    worker: int = 0
    workers: int = 1
    missing_shards: int = 0
    missing_sums: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return {**asdict(self), "outputs": list(self.outputs)}

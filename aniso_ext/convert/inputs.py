"""Whether the input is of the kind that the aligner was fitted on: unit rows or not, and of which encoder."""

from __future__ import annotations

import json
import warnings

import numpy as np

from aniso_ext.convert.rows import bad_rows
from aniso_ext.convert.shard import RowAligner
from aniso_ext.data import EmbeddingSet, Shard
from aniso_ext.data.shards import unusable

SAMPLED_SHARDS = 16
SAMPLED_ROWS = 16
"""First rows of each sampled shard: they are cheap to read in every format."""


def check_encoder(aligner: RowAligner, embeddings: EmbeddingSet) -> None:
    """Refuse an input whose file names another encoder than the aligner's; most files and many aligners name none.

    Raises:
        DataError: both encoders are named.
    """
    fitted = getattr(aligner, "encoder_", None)
    shard = embeddings.shards[0]
    found = None if fitted is None else stored_encoder(shard)
    if found is not None and found != fitted:
        reason = f"holds embeddings of {found}, but the aligner was fitted on {fitted}"
        raise unusable(shard.path, reason, "use embeddings of that encoder, or fit on these")


def stored_encoder(shard: Shard) -> str | None:
    """The entry ``encoder`` in the metadata of a .safetensors or .parquet file."""
    if shard.path is None or shard.format not in ("safetensors", "parquet"):
        return None
    if shard.format == "parquet":
        import pyarrow.parquet as pq

        with shard.path.open("rb") as file:
            found = (pq.read_schema(file).metadata or {}).get(b"encoder")
        return None if found is None else str(found.decode(errors="replace"))
    with shard.path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    named = header.get("__metadata__", {}).get("encoder")
    return None if named is None else str(named)


def warn_of_norms(aligner: RowAligner, embeddings: EmbeddingSet) -> None:
    """Warn once if a sample of the input is not normalised as the rows were that the aligner was fitted on.

    Warns:
        UserWarning: the share of such rows and one of them.
    """
    corpora = getattr(aligner, "corpora_", {})
    fitted_on_unit = corpora.get("source", {}).get("unit_rows")
    if fitted_on_unit is None:
        return
    from aniso_ext.align.rows import UNIT_TOLERANCE

    names, norms = _sampled_norms(embeddings)
    odd = np.flatnonzero((np.abs(norms - 1) <= UNIT_TOLERANCE) != fitted_on_unit)
    if len(odd):
        fitted, remedy = ("rows of norm 1", "L2-normalise") if fitted_on_unit else ("other rows", "do not normalise")
        warnings.warn(
            f"{len(odd) / len(norms):.0%} of {len(norms)} sampled input rows have another norm than those that the "
            f"aligner was fitted on: {names[odd[0]]} has norm {norms[odd[0]]:.4g}, it was fitted on {fitted}: "
            f"{remedy} the input",
            stacklevel=3,
        )


def _sampled_norms(embeddings: EmbeddingSet) -> tuple[list[str], np.ndarray]:
    """Names and norms of usable rows at the beginning of shards that are evenly spaced over the set."""
    shards = embeddings.shards
    names, norms = [], []
    for number in np.unique(np.linspace(0, len(shards) - 1, SAMPLED_SHARDS).astype(int)).tolist():
        shard = shards[number]
        rows = min(shard.rows, SAMPLED_ROWS)
        sample = np.concatenate(list(shard.batches(0, rows, rows))).astype(np.float64)
        usable = np.setdiff1d(np.arange(len(sample)), bad_rows(sample))
        names += [f"row {row} of {shard.name}" for row in usable]
        norms.append(np.linalg.norm(sample[usable], axis=1))
    return names, np.concatenate(norms)

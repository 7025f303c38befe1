"""The clip-retrieval layout: img_emb/img_emb_0.npy, text_emb/text_emb_0.npy, metadata/metadata_0.parquet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.data.embedding_set import EmbeddingSet, open_embeddings
from aniso_ext.data.folder import KINDS, natural_key
from aniso_ext.data.locations import Draft, Location, make_folders, remove_folders, to_location, why
from aniso_ext.data.shards import unusable
from aniso_ext.data.writer import EmbeddingWriter
from aniso_ext.errors import InputError

if TYPE_CHECKING:
    import pyarrow

METADATA = "metadata"


def write_clip_retrieval(
    folder: str | os.PathLike[str] | Location,
    *,
    image: Any = None,
    text: Any = None,
    metadata: Mapping[str, Sequence[Any]] | None = None,
    rows_per_shard: int = 1_000_000,
    dtype: Any = None,
) -> list[Location]:
    """Write paired rows in the clip-retrieval layout; the files made come back.

    Args:
        folder: path or fsspec URL; made if missing; must not have any of the files already.
        image, text: anything that :func:`open_embeddings` takes; at least one of them.
        metadata: columns of one value a row.
        rows_per_shard: rows of each file but the last.
        dtype: stored dtype; by default that of the input.

    Raises:
        InputError: nothing to write, or row counts that differ (all are named).
        DataError: a file exists or cannot be written; what was made is removed again.

    Example:
        >>> import numpy as np, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> files = write_clip_retrieval(folder, image=np.eye(2), text=np.eye(2), metadata={"caption": ["a", "b"]})
        >>> open_embeddings(folder, kind="text").rows, read_metadata(folder).column("caption").to_pylist()
        (2, ['a', 'b'])
    """
    folder = to_location(folder)
    sides = {kind: open_embeddings(rows) for kind, rows in (("image", image), ("text", text)) if rows is not None}
    rows = _common_rows(sides, metadata or {})
    if isinstance(rows_per_shard, bool) or not isinstance(rows_per_shard, int) or rows_per_shard < 1:
        raise InputError(f"rows_per_shard must be a positive integer, got {rows_per_shard!r}")
    written: list[Location] = []
    made = make_folders(folder)
    try:
        for number, start in enumerate(range(0, rows, rows_per_shard)):
            stop = min(start + rows_per_shard, rows)
            for kind, embeddings in sides.items():
                path = folder / KINDS[kind] / f"{KINDS[kind]}_{number}.npy"
                made = make_folders(path.parent) + made
                _write_range(path, embeddings, start, stop, dtype)
                written.append(path)
            if metadata:
                path = folder / METADATA / f"{METADATA}_{number}.parquet"
                made = make_folders(path.parent) + made
                _write_table(path, {name: values[start:stop] for name, values in metadata.items()})
                written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        remove_folders(made)
        raise
    return written


def read_metadata(
    folder: str | os.PathLike[str] | Location, columns: Sequence[str] | None = None, *, rows: int | None = None
) -> pyarrow.Table:
    """The metadata of a clip-retrieval folder as one table, row i describing embedding i.

    Args:
        folder: path or fsspec URL of the folder that holds ``metadata/``.
        columns: names to read; all by default.
        rows: number of rows that the metadata must have, such as that of the embeddings.

    Raises:
        DataError: no metadata, a damaged file, or another number of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = to_location(folder) / METADATA
    files = metadata_files(to_location(folder))
    if not files:
        raise unusable(place, "has no .parquet files", "pass the folder that holds metadata/")
    tables = []
    for path in files:
        try:
            source = path if isinstance(path, Path) else pa.PythonFile(path.open("rb"), mode="r")
            tables.append(pq.read_table(source, columns=None if columns is None else list(columns)))
        except (pa.ArrowException, OSError) as error:
            reason = f"cannot be read as parquet ({str(error)[:100]})"
            raise unusable(path, reason, "copy or write it again") from None
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise unusable(place, f"has files whose columns differ ({str(error)[:100]})", "write them again") from None
    if rows is not None and table.num_rows != rows:
        raise unusable(place, f"has {table.num_rows} rows for {rows} embeddings", "use files of one run")
    return table


def metadata_files(folder: Location) -> list[Location]:
    """The parquet files in ``metadata/`` of a folder in natural order; none if there is no metadata."""
    place = folder / METADATA
    try:
        return sorted(place.glob("[!.]*.parquet"), key=natural_key) if place.is_dir() else []
    except OSError as error:
        raise unusable(place, f"cannot be listed ({why(error)})", "check the permissions") from None


def _common_rows(sides: Mapping[str, EmbeddingSet], metadata: Mapping[str, Sequence[Any]]) -> int:
    if not sides:
        raise InputError("write_clip_retrieval needs image or text embeddings")
    counts = {kind: embeddings.rows for kind, embeddings in sides.items()}
    counts.update({f"metadata {name!r}": len(values) for name, values in metadata.items()})
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"paired rows must be equally many, got {listed}")
    rows = next(iter(counts.values()))
    if rows < 1:
        raise InputError("there are no rows to write")
    return rows


def _write_range(path: Location, embeddings: EmbeddingSet, start: int, stop: int, dtype: Any) -> None:
    step = max(1, (16 << 20) // (embeddings.width * embeddings.dtype.itemsize))
    stored = embeddings.dtype if dtype is None else dtype
    with EmbeddingWriter(path, dtype=stored, width=embeddings.width) as writer:
        for batch in embeddings.iter_range(start, stop, step):
            writer.write(batch)


def _write_table(path: Location, columns: Mapping[str, Sequence[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        raise unusable(path, "exists already", "choose another folder")
    try:
        with Draft(path) as draft:
            pq.write_table(pa.table({name: pa.array(list(values)) for name, values in columns.items()}), draft.path)
            draft.publish()
    except (pa.ArrowException, OSError) as error:
        raise unusable(path, f"cannot be written ({error})", "check the columns, space and permissions") from None

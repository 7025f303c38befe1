"""Pickled records of paired embeddings, turned once into the clip-retrieval layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aniso_ext.data.clip_retrieval import write_clip_retrieval
from aniso_ext.data.dtypes import STORED_DTYPES
from aniso_ext.data.locations import Location, to_location
from aniso_ext.data.restricted_pickle import read_pickle
from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError

_ONLY = "embeddings"
_HINTS = {"source": ("text", "txt", "caption"), "target": ("image", "img", "visual", "vision")}
_SCALARS = (str, bytes, bool, int, float, np.generic, type(None))


@dataclass(frozen=True)
class PickleImport:
    """What an import wrote.

    Attributes:
        files: paths of the files.
        rows, width: N and D.
        source, target: fields that became ``text_emb`` and ``img_emb``; None if there is none.
        metadata: fields that became columns of the metadata.
        left_out: fields that were not imported, and why.
    """

    files: tuple[str, ...]
    rows: int
    width: int
    source: str | None
    target: str | None
    metadata: tuple[str, ...]
    left_out: dict[str, str]


def import_pickle(
    path: str | os.PathLike[str] | Location,
    output_folder: str | os.PathLike[str] | Location,
    *,
    source_key: str | None = None,
    target_key: str | None = None,
    rows_per_shard: int = 1_000_000,
    dtype: Any = None,
) -> PickleImport:
    """Write pickled records as ``text_emb/``, ``img_emb/`` and ``metadata/`` of a folder.

    The pickle is read as data, never run: anything but NumPy arrays, builtin containers, texts and numbers is refused.
    It may hold a dict of columns ([N, D] arrays or lists of [D] rows; texts and numbers become metadata), a list of one
    dict a row, or nothing but rows. All of it is held in memory.

    Args:
        path: the pickle.
        output_folder: made if missing; must not have any of the files already.
        source_key: field that becomes ``text_emb``; by default the only one whose name speaks of text.
        target_key: field that becomes ``img_emb``; by default the only one whose name speaks of images.
        rows_per_shard: rows of each file but the last.
        dtype: stored dtype; by default that of the arrays.

    Raises:
        DataError: the pickle is refused or damaged, or its rows do not fit together; nothing is written.
        InputError: it cannot be told which field is which (all are named).

    Example:
        >>> import numpy as np, pickle, tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> records = {"text_embeds": np.eye(2), "image_embeds": np.eye(2), "captions": ["a", "b"]}
        >>> _ = (folder / "pairs.pkl").write_bytes(pickle.dumps(records))
        >>> done = import_pickle(folder / "pairs.pkl", folder / "pairs")
        >>> done.source, done.target, done.metadata
        ('text_embeds', 'image_embeds', ('captions',))
    """
    path = to_location(path)
    fields = _fields(path, read_pickle(path))
    found = {name: _matrix(path, name, value) for name, value in fields.items()}
    matrices = {name: rows for name, rows in found.items() if rows is not None}
    chosen = _choose(path, matrices, source_key, target_key)
    sides = {side: matrices[name] for side, name in chosen.items() if name is not None}
    rows = len(next(iter(sides.values())))
    metadata, left_out = _metadata({name: v for name, v in fields.items() if name not in chosen.values()}, rows)
    files = write_clip_retrieval(
        output_folder,
        text=sides.get("source"),
        image=sides.get("target"),
        metadata=metadata,
        rows_per_shard=rows_per_shard,
        dtype=dtype,
    )
    width = next(iter(sides.values())).shape[1]
    return PickleImport(
        tuple(map(str, files)), rows, width, chosen["source"], chosen["target"], tuple(metadata), left_out
    )


def _fields(path: Location, value: Any) -> dict[str, Any]:
    """The columns of whatever form the records have."""
    if isinstance(value, np.ndarray):
        return {_ONLY: value}
    if isinstance(value, dict):
        return {str(name): column for name, column in value.items()}
    if not isinstance(value, (list, tuple)) or not value:
        what = "nothing" if not value else f"a {type(value).__name__}"
        raise unusable(path, f"holds {what}, not records", "store a dict of columns, or a list of one dict a row")
    if not isinstance(value[0], dict):
        return {_ONLY: value}
    for row, record in enumerate(value):
        if not isinstance(record, dict) or record.keys() != value[0].keys():
            theirs = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
            reason = f"row {row} has {theirs}, but row 0 has {sorted(map(str, value[0]))}"
            raise unusable(path, reason, "give every row the same fields")
    return {str(name): [record[name] for record in value] for name in value[0]}


def _choose(
    path: Location, matrices: Mapping[str, np.ndarray], source_key: str | None, target_key: str | None
) -> dict[str, str | None]:
    """The fields of both sides: those that were named, else by what their names say, else the only one."""
    chosen = {"source": source_key, "target": target_key}
    for side, key in chosen.items():
        if key is not None and key not in matrices:
            raise InputError(f"{path}: field {key!r} has no embeddings: {_listed(matrices)}: pass another {side}_key")
    for side in chosen:
        if chosen[side] is None:
            chosen[side] = _guess(path, side, [name for name in matrices if name not in chosen.values()])
    if not any(chosen.values()):
        if len(matrices) != 1:
            reason = f"cannot tell source from target: {_listed(matrices)}"
            raise InputError(f"{path}: {reason}: pass source_key or target_key")
        chosen["source"] = next(iter(matrices))
    return chosen


def _matrix(path: Location, name: str, value: Any) -> np.ndarray | None:
    """[N, D] rows of a field; None if it has none."""
    if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], np.ndarray) and value[0].ndim == 1:
        for row, vector in enumerate(value):
            ours = vector.shape if isinstance(vector, np.ndarray) else type(vector).__name__
            if ours != value[0].shape:
                reason = f"field {name!r}: row {row} is {ours}, but row 0 is {value[0].shape}"
                raise unusable(path, reason, "give every row the same width")
        value = np.stack(value)
    elif isinstance(value, (list, tuple)) and len(value) and _floats(value[0]):
        if any(not _floats(row) or len(row) != len(value[0]) for row in value):
            return None
        value = np.array(value, np.float64)
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.name not in STORED_DTYPES or not value.size:
        return None
    return value


def _floats(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and len(row) > 0 and all(type(number) is float for number in row)


def _guess(path: Location, side: str, names: Sequence[str]) -> str | None:
    found = [name for name in names if any(hint in name.lower() for hint in _HINTS[side])]
    if len(found) > 1:
        raise InputError(f"{path}: {' and '.join(map(repr, found))} may all be the {side}: pass {side}_key")
    return found[0] if found else None


def _listed(matrices: Mapping[str, np.ndarray]) -> str:
    shapes = ", ".join(f"{name} {list(rows.shape)}" for name, rows in matrices.items())
    return f"fields with embeddings are {shapes}" if shapes else "no field has floating [N, D] rows"


def _metadata(fields: Mapping[str, Any], rows: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Fields with one text or number a row as columns, and the reasons why the others are none."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    left_out: dict[str, str] = {}
    for name, value in fields.items():
        try:
            values = value.tolist() if isinstance(value, np.ndarray) else value
            if not isinstance(values, (list, tuple)) or not all(isinstance(item, _SCALARS) for item in values):
                left_out[name] = "is not one text or number a row"
            elif len(values) != rows:
                left_out[name] = f"has {len(values)} values for {rows} rows"
            else:
                values = [item.item() if isinstance(item, np.generic) else item for item in values]
                pa.array(values)
                columns[name] = values
        except (pa.ArrowException, ValueError, OverflowError) as error:
            left_out[name] = f"does not make a column ({' '.join(str(error).split())[:80]})"
    return columns, left_out

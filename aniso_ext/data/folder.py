"""Which files of a folder are the shards of an embedding set."""

from __future__ import annotations

import re
from pathlib import Path

from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError

FORMATS = {".npy": "npy", ".parquet": "parquet", ".safetensors": "safetensors"}
KINDS = {"image": "img_emb", "text": "text_emb"}
_PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".bin"}


def natural_key(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which shard_2 comes before shard_10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]


def format_of(path: Path) -> str | None:
    """npy, parquet or safetensors by suffix; None for anything else."""
    return FORMATS.get(path.suffix.lower())


def find_shards(path: Path, kind: str | None) -> list[Path]:
    """The shard files of ``path`` in natural order of their names; hidden files are passed over.

    Raises:
        InputError: an unknown kind.
        DataError: nothing there, nothing readable there, or more than one thing that could be meant.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind must be 'image' or 'text', got {kind!r}")
    if not path.exists():
        remedy = "copy it to a local folder first" if "://" in str(path) or ":/" in str(path) else "check the path"
        raise unusable(path, "does not exist", remedy)
    if path.is_dir():
        return _in_folder(_choose_kind(path, kind))
    if format_of(path) is None:
        pickled = path.suffix.lower() in _PICKLED
        reason = "is a pickle, and pickles are never loaded" if pickled else f"has the unknown suffix {path.suffix!r}"
        raise unusable(path, reason, f"store the embeddings as {', '.join(FORMATS)}")
    return [path]


def _choose_kind(folder: Path, kind: str | None) -> Path:
    present = [name for name in KINDS.values() if (folder / name).is_dir()]
    if not present:
        if kind is not None and folder.name in KINDS.values() and folder.name != KINDS[kind]:
            raise unusable(folder, f"is not the folder of {kind} embeddings", f"pass kind=None or {KINDS[kind]}")
        return folder
    if any(format_of(entry) for entry in _visible_files(folder)):
        raise unusable(folder, f"has shards of its own beside {' and '.join(present)}", "pass one of those folders")
    if kind is None:
        if len(present) > 1:
            raise unusable(folder, f"has both {present[0]} and {present[1]}", "pass kind='image' or kind='text'")
        return folder / present[0]
    if KINDS[kind] not in present:
        raise unusable(folder, f"has {present[0]} but no {KINDS[kind]}", f"pass a folder with {kind} embeddings")
    return folder / KINDS[kind]


def _visible_files(folder: Path) -> list[Path]:
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise unusable(folder, f"cannot be listed ({error.strerror})", "check the permissions") from None
    return [entry for entry in entries if format_of(entry) or not entry.is_dir()]


def _in_folder(folder: Path) -> list[Path]:
    files = _visible_files(folder)
    shards = sorted((entry for entry in files if format_of(entry)), key=natural_key)
    formats = sorted({str(format_of(entry)) for entry in shards})
    if not shards:
        pickles = [entry.name for entry in files if entry.suffix.lower() in _PICKLED]
        found = f"only pickles such as {pickles[0]}, which are never loaded" if pickles else "no embeddings in it"
        raise unusable(folder, f"has {found}", f"put {', '.join(FORMATS)} files directly into it")
    if len(formats) > 1:
        raise unusable(folder, f"mixes {' and '.join(formats)} files", "keep one format in a folder, or pass one file")
    return shards

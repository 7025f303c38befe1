"""Which files of a folder are the shards of an embedding set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from aniso_ext.data.locations import Location, why
from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError

FORMATS = {
    ".npy": "npy",
    ".parquet": "parquet",
    ".safetensors": "safetensors",
    ".arrow": "arrow",
    ".feather": "arrow",
}
SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "safetensors": ".safetensors", "arrow": ".arrow"}
KINDS = {"image": "img_emb", "text": "text_emb"}
_PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".bin"}
_IMPORTED = {".pkl", ".pickle"}


@dataclass(frozen=True)
class Found:
    """The files of an embedding set.

    Attributes:
        files: shards in natural order of their names.
        folder: what was named, if that is a folder.
        half: ``img_emb`` or ``text_emb``, if ``folder`` has the clip-retrieval layout and the files lie in its half.
    """

    files: tuple[Location, ...]
    folder: Location | None = None
    half: str | None = None


def natural_key(path: Location) -> list[tuple[int, int | str]]:
    """Sort key under which shard_2 comes before shard_10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]


def format_of(path: Location | PurePath) -> str | None:
    """npy, parquet, safetensors or arrow by suffix; None for anything else."""
    return FORMATS.get(path.suffix.lower())


def find_shards(path: Location, kind: str | None) -> Found:
    """The shard files of ``path`` in natural order of their names; hidden files are passed over.

    Raises:
        InputError: an unknown kind.
        DataError: nothing there, nothing readable there, or more than one thing that could be meant.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"kind must be 'image' or 'text', got {kind!r}")
    try:
        is_folder = path.is_dir()
        if not is_folder and not path.exists():
            raise unusable(path, "does not exist", "check the path")
    except OSError as error:
        raise unusable(path, f"cannot be reached ({why(error)})", "check the path and the permissions") from None
    if is_folder:
        half = _choose_half(path, kind)
        return Found(_in_folder(path if half is None else path / half), path, half)
    if format_of(path) is None:
        raise _not_readable(path)
    return Found((path,))


def _not_readable(path: Location) -> Exception:
    suffix = path.suffix.lower()
    if suffix in _IMPORTED:
        return unusable(path, "is a pickle, and pickles are never loaded", "convert it once with aniso import-pickle")
    pickled = suffix in _PICKLED
    reason = "is a pickle, and pickles are never loaded" if pickled else f"has the unknown suffix {path.suffix!r}"
    return unusable(path, reason, f"store the embeddings as {', '.join(FORMATS)}")


def _choose_half(folder: Location, kind: str | None) -> str | None:
    """The half of a clip-retrieval folder that is meant; None if the folder does not have that layout."""
    present = [name for name in KINDS.values() if (folder / name).is_dir()]
    if not present:
        if kind is not None and folder.name in KINDS.values() and folder.name != KINDS[kind]:
            raise unusable(folder, f"is not the folder of {kind} embeddings", f"pass kind=None or {KINDS[kind]}")
        return None
    if any(format_of(entry) for entry in _visible_files(folder)):
        raise unusable(folder, f"has shards of its own beside {' and '.join(present)}", "pass one of those folders")
    if kind is None:
        if len(present) > 1:
            raise unusable(folder, f"has both {present[0]} and {present[1]}", "pass kind='image' or kind='text'")
        return present[0]
    if KINDS[kind] not in present:
        raise unusable(folder, f"has {present[0]} but no {KINDS[kind]}", f"pass a folder with {kind} embeddings")
    return KINDS[kind]


def _visible_files(folder: Location) -> list[Location]:
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        return [entry for entry in entries if format_of(entry) or not entry.is_dir()]
    except OSError as error:
        raise unusable(folder, f"cannot be listed ({why(error)})", "check the permissions") from None


def _in_folder(folder: Location) -> tuple[Location, ...]:
    files = _visible_files(folder)
    shards = sorted((entry for entry in files if format_of(entry)), key=natural_key)
    formats = sorted({str(format_of(entry)) for entry in shards})
    if not shards:
        pickles = [entry for entry in files if entry.suffix.lower() in _PICKLED]
        found = f"only pickles such as {pickles[0].name}, which are never loaded" if pickles else "no embeddings in it"
        imported = pickles and pickles[0].suffix.lower() in _IMPORTED
        remedy = "convert them once with aniso import-pickle" if imported else f"put {', '.join(FORMATS)} files into it"
        raise unusable(folder, f"has {found}", remedy)
    if len(formats) > 1:
        raise unusable(folder, f"mixes {' and '.join(formats)} files", "keep one format in a folder, or pass one file")
    return tuple(shards)

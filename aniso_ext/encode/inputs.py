"""What is to be embedded: image files and captions, each sample with an id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aniso_ext.data.folder import natural_key
from aniso_ext.data.shards import unusable
from aniso_ext.errors import DataError, InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Samples:
    """Columns of equal length; ``images`` or ``captions`` is None if that side is not embedded.

    ``images`` are paths as the user named them, ``root`` is where relative ones start.
    """

    ids: Sequence[str]
    images: Sequence[str | None] | None
    captions: Sequence[str | None] | None
    root: Path

    def __len__(self) -> int:
        return len(self.ids)

    def image_path(self, row: int) -> Path:
        """Where the image of a row is; the row must name one."""
        assert self.images is not None
        return self.root / str(self.images[row])

    def fingerprint(self) -> str:
        """SHA-256 of ids, captions, image names and sizes of image files, in order."""
        digest = hashlib.sha256()
        for row, id in enumerate(self.ids):
            entry: list[Any] = [id]
            if self.captions is not None:
                entry.append(self.captions[row])
            if self.images is not None:
                named = self.images[row]
                entry += [named, None if named is None else _size(self.root / named)]
            digest.update(json.dumps(entry).encode() + b"\n")
        return digest.hexdigest()


def read_samples(images: str | Path | None = None, captions: str | Path | None = None) -> Samples:
    """The samples that one or two inputs name.

    Args:
        images: a folder (searched in depth, natural order), a .txt file with a path a line, or a .jsonl or .parquet
            table with a column ``image``. Relative paths start at the folder of the file that names them.
        captions: a .txt file with a caption a line, or a table with a column ``caption``. The table that names the
            images may be passed here as well; two different inputs are joined by ``id``.

    A column ``id`` names the samples; without it an image is named by its path, less the suffix where that is unique, a
    caption by its line number from 0.

    Raises:
        DataError: an input cannot be read, lacks a column, has no rows, or an id occurs twice or on one side only.
        InputError: neither input is given.
    """
    if images is None and captions is None:
        raise InputError("nothing to embed: pass images, captions or both")
    sides = [
        _read(Path(place), what) for place, what in ((images, "image"), (captions, "caption")) if place is not None
    ]
    for side in sides:
        _check_ids(side)
    if len(sides) == 1:
        (side,) = sides
    elif sides[0].place == sides[1].place:
        side = sides[0]
    else:
        return _joined(*sides)
    pictures = side.column("image") if images is not None else None
    texts = side.column("caption") if captions is not None else None
    return Samples(side.ids, pictures, texts, side.root)


@dataclass(frozen=True)
class _Side:
    """One input as columns."""

    place: Path
    root: Path
    columns: dict[str, list[Any]]
    wanted: str

    @property
    def ids(self) -> list[str]:
        if (named := self.columns.get("id")) is not None:
            return [str(id) for id in named]
        if (pictures := self.columns.get("image")) is not None and self.wanted == "image":
            names = [f"row {row}" if name is None else name for row, name in enumerate(pictures)]
            stems = [_stem(name) for name in names]
            return stems if len(set(stems)) == len(stems) else names
        return [str(row) for row in range(len(self.columns[self.wanted]))]

    def column(self, name: str) -> list[str | None]:
        if name not in self.columns:
            has = ", ".join(self.columns) or "none"
            raise unusable(self.place, f"has no column {name!r} (columns: {has})", "name the column so")
        values = self.columns[name]
        for row, value in enumerate(values):
            if value is not None and not isinstance(value, str):
                kind = type(value).__name__
                reason = f"row {row} of {name!r} is {kind}, not text"
                raise unusable(self.place, reason, "store paths and captions as text")
        return values


def _read(place: Path, wanted: str) -> _Side:
    if not place.exists():
        raise unusable(place, "does not exist", "check the path")
    suffix = place.suffix.lower()
    if place.is_dir():
        if wanted != "image":
            raise unusable(place, "is a folder", "pass captions as .txt, .jsonl or .parquet")
        return _Side(place, place, {"image": _images_in(place)}, wanted)
    if suffix == ".txt":
        return _Side(place, place.parent, {wanted: _lines(place)}, wanted)
    if suffix == ".jsonl":
        columns = _json_columns(place)
    elif suffix == ".parquet":
        columns = _parquet_columns(place)
    else:
        reason = f"has the unknown suffix {place.suffix!r}"
        raise unusable(place, reason, "pass a folder of images, .txt, .jsonl or .parquet")
    side = _Side(place, place.parent, columns, wanted)
    side.column(wanted)
    return side


def _images_in(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    visible = [path.relative_to(folder) for path in found if not path.name.startswith(".")]
    if not visible:
        raise unusable(folder, "has no images", f"put {', '.join(IMAGE_SUFFIXES)} files into it")
    ordered = sorted(visible, key=lambda path: [natural_key(Path(part)) for part in path.parts])
    return [path.as_posix() for path in ordered]


def _lines(path: Path) -> list[str]:
    # only \n ends a line: captions may hold the other characters that str.splitlines takes for line ends
    lines = _text(path).split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise unusable(path, f"cannot be read as UTF-8 text ({error})", "store it as UTF-8") from None


def _json_columns(path: Path) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise unusable(path, f"line {number} is not JSON ({error})", "write one JSON object a line") from None
        if not isinstance(row, dict):
            raise unusable(path, f"line {number} is not a JSON object", "write one JSON object a line")
        rows.append(row)
    names = [name for name in ("id", "image", "caption") if any(name in row for row in rows)]
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet_columns(path: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = [name for name in ("id", "image", "caption") if name in pq.read_schema(path).names]
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise unusable(path, f"cannot be read as parquet ({str(error)[:100]})", "copy or write it again") from None
    return {name: table.column(name).to_pylist() for name in names}


def _check_ids(side: _Side) -> None:
    ids = side.ids
    if not ids:
        raise unusable(side.place, "has no rows", "pass at least one sample")
    if (twice := _first_repeated(ids)) is not None:
        first, second = twice
        reason = f"rows {first} and {second} have the same id {ids[second]!r}"
        raise unusable(side.place, reason, "give each sample an id of its own in a column 'id'")


def _first_repeated(values: Iterable[str]) -> tuple[int, int] | None:
    seen: dict[str, int] = {}
    for row, value in enumerate(values):
        if (first := seen.setdefault(value, row)) != row:
            return first, row
    return None


def _joined(pictures: _Side, texts: _Side) -> Samples:
    captions = dict(zip(texts.ids, texts.column("caption"), strict=True))
    ids = pictures.ids
    unmatched = [id for id in ids if id not in captions]
    if unmatched or len(captions) != len(ids):
        alone = unmatched[0] if unmatched else next(iter(set(captions) - set(ids)))
        raise DataError(
            f"{pictures.place} has {len(ids)} samples and {texts.place} has {len(captions)}, and id {alone!r} is in "
            "one of them only: give both the same ids"
        )
    return Samples(ids, pictures.column("image"), [captions[id] for id in ids], pictures.root)


def _stem(name: str) -> str:
    head, dot, tail = name.rpartition(".")
    return head if dot and "/" not in tail else name


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None

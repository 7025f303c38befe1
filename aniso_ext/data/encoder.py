"""Which encoder made a set of embeddings: ``encoder.json`` beside its shards, or an entry in their own metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from aniso_ext.data.embedding_set import EmbeddingSet
from aniso_ext.data.folder import KINDS
from aniso_ext.data.locations import Location
from aniso_ext.data.shards import Shard, unusable
from aniso_ext.data.whole_file import replace_file
from aniso_ext.errors import DataError

ENCODER_FILE = "encoder.json"


@dataclass(frozen=True)
class EncoderRecord:
    """The content of ``encoder.json``.

    Attributes:
        name: tells encoders apart; two sets belong to one space if and only if their names are equal.
        model: the library's name of the architecture.
        pretrained: the library's name of the weights, or None.
        checkpoint: SHA-256 of the file of weights, or None.
        width: D of the embeddings.
        normalised: whether the rows are unit vectors.
        image_size: pixels (height, width) that the image tower sees.
        library: library and version, such as ``open_clip 3.3.0``.
    """

    name: str
    model: str
    pretrained: str | None
    checkpoint: str | None
    width: int
    normalised: bool
    image_size: tuple[int, int]
    library: str

    def write(self, folder: Path) -> Path:
        """Write ``encoder.json`` into a folder that exists; the file appears whole."""
        path = folder / ENCODER_FILE
        replace_file(path, (json.dumps(asdict(self), indent=2) + "\n").encode())
        return path

    @classmethod
    def read(cls, path: Location) -> EncoderRecord:
        """The record in a file.

        Raises:
            DataError: it is not one.
        """
        try:
            content = json.loads(path.read_bytes())
            values = {field.name: content[field.name] for field in fields(cls)}
            height, width = values["image_size"]
            record = cls(**{**values, "image_size": (int(height), int(width)), "width": int(values["width"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"is no record of an encoder ({type(error).__name__}: {error})"
            raise unusable(path, reason, "remove it, or write the embeddings again") from None
        return record


def find_encoder_record(path: Location) -> EncoderRecord | None:
    """The record beside a shard; for shards in ``img_emb`` or ``text_emb`` also one folder up."""
    folders = [path.parent, path.parent.parent] if path.parent.name in KINDS.values() else [path.parent]
    for folder in folders:
        if (folder / ENCODER_FILE).is_file():
            return EncoderRecord.read(folder / ENCODER_FILE)
    return None


def stored_encoder(shard: Shard) -> str | None:
    """Name of the encoder of a shard: the metadata entry ``encoder`` of the file, else ``encoder.json``, else None.

    Raises:
        DataError: ``encoder.json`` is damaged, or is of another width than the shard.
    """
    if shard.path is None:
        return None
    if (named := _named_inside(shard.path, shard.format)) is not None:
        return named
    record = find_encoder_record(shard.path)
    if record is None:
        return None
    if record.width != shard.width:
        reason = f"has width {shard.width}, but {ENCODER_FILE} beside it is of an encoder of width {record.width}"
        raise unusable(shard.path, reason, f"remove {ENCODER_FILE} if it belongs to other embeddings")
    return record.name


def common_encoder(source: EmbeddingSet, target: EmbeddingSet) -> str | None:
    """Name of the encoder of both sets; None if one of them names none.

    Raises:
        DataError: the two differ; both are named.
    """
    ours, theirs = stored_encoder(source.shards[0]), stored_encoder(target.shards[0])
    if ours is None or theirs is None:
        return None
    if ours != theirs:
        raise DataError(
            f"{source.shards[0].path}: holds embeddings of {ours}, but {target.shards[0].path} those of {theirs}: "
            "embed both sides with one encoder"
        )
    return ours


def _named_inside(path: Location, format: str) -> str | None:
    if format == "parquet":
        import pyarrow.parquet as pq

        with path.open("rb") as file:
            found = (pq.read_schema(file).metadata or {}).get(b"encoder")
        return None if found is None else str(found.decode(errors="replace"))
    if format == "safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        named = header.get("__metadata__", {}).get("encoder")
        return None if named is None else str(named)
    return None

"""An open_clip model as an encoder of both modalities, and the record that tells it apart from others."""

from __future__ import annotations

import hashlib
from pathlib import Path

from aniso_ext.data import EncoderRecord
from aniso_ext.encode.library import open_clip

LOCAL = "local-dir"


def local_record(weights: Path, width: int, image_size: tuple[int, int]) -> EncoderRecord:
    """The record of a model in a folder; its weights name it, wherever the folder is."""
    digest = file_hash(weights)
    return EncoderRecord(
        name=f"{LOCAL} sha256:{digest[:16]}",
        model=LOCAL,
        pretrained=None,
        checkpoint=digest,
        width=width,
        normalised=True,
        image_size=image_size,
        library=library_version(),
    )


def library_version() -> str:
    return f"open_clip {open_clip().__version__}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

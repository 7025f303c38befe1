"""Images and texts to embedding sets, with the models of open_clip."""

from __future__ import annotations

from aniso_ext.encode.encoder import Encoder
from aniso_ext.encode.pipeline import BadSample, EmbedReport, embed_files

__all__ = ["BadSample", "EmbedReport", "Encoder", "embed_files"]

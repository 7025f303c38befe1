"""Conversion of embedding sets from files to files: atomic shards, a manifest, resume."""

from aniso_ext.convert.pipeline import convert_embeddings
from aniso_ext.convert.report import ConversionReport
from aniso_ext.convert.shard import RowAligner

__all__ = ["ConversionReport", "RowAligner", "convert_embeddings"]

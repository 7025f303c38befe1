"""Conversion of embedding sets from files to files: atomic shards, a manifest, resume."""

from aniso_ext.convert.pipeline import RowAligner, convert_embeddings
from aniso_ext.convert.report import ConversionReport

__all__ = ["ConversionReport", "RowAligner", "convert_embeddings"]

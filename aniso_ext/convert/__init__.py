"""Conversion of embedding sets from files to files: atomic shards, a manifest, resume."""

from aniso_ext.convert.pipeline import convert_embeddings
from aniso_ext.convert.ray_engine import convert_on_ray
from aniso_ext.convert.report import ConversionReport
from aniso_ext.convert.shard import RowAligner
from aniso_ext.convert.workers import Worker, parse_worker, worker_from_environment

__all__ = [
    "ConversionReport",
    "RowAligner",
    "Worker",
    "convert_embeddings",
    "convert_on_ray",
    "parse_worker",
    "worker_from_environment",
]

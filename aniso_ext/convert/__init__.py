"""Conversion of embedding sets from files to files: atomic shards, a manifest, resume."""

from aniso_ext.convert.pipeline import convert_embeddings
from aniso_ext.convert.preview import ConversionPlan, preview_conversion
from aniso_ext.convert.ray_engine import convert_on_ray
from aniso_ext.convert.report import ConversionReport
from aniso_ext.convert.shard import RowAligner
from aniso_ext.convert.verify import VerificationReport, verify_conversion
from aniso_ext.convert.workers import Worker, local_device, parse_worker, worker_from_environment

__all__ = [
    "ConversionPlan",
    "ConversionReport",
    "RowAligner",
    "VerificationReport",
    "Worker",
    "convert_embeddings",
    "convert_on_ray",
    "local_device",
    "parse_worker",
    "preview_conversion",
    "verify_conversion",
    "worker_from_environment",
]

"""Aligners: from rows of a source modality to stand-ins for a target modality, all behind one interface."""

from aniso_ext.align.aniso import AnisoAlign
from aniso_ext.align.artefact import load_aligner
from aniso_ext.align.base import Aligner
from aniso_ext.align.baselines import (
    C3Code,
    C3Paper,
    GaussianMonge,
    Identity,
    MeanShift,
    PerDimensionStd,
    Permuted,
    ReAlign,
    Unicorn,
)
from aniso_ext.align.mixing import MIXINGS
from aniso_ext.align.prior import PriorOptions
from aniso_ext.align.refiner import RefinementOptions
from aniso_ext.align.registry import list_aligners, make_aligner, register
from aniso_ext.align.training import TrainingOptions

__all__ = [
    "MIXINGS",
    "Aligner",
    "AnisoAlign",
    "C3Code",
    "C3Paper",
    "GaussianMonge",
    "Identity",
    "MeanShift",
    "PerDimensionStd",
    "Permuted",
    "PriorOptions",
    "ReAlign",
    "RefinementOptions",
    "TrainingOptions",
    "Unicorn",
    "list_aligners",
    "load_aligner",
    "make_aligner",
    "register",
]

"""Turn source-modality embeddings into stand-ins for a target modality of one contrastive space.

Importing the package is cheap: torch, the compiled kernels and everything else load on first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("aniso_ext")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_EXPORTS = {
    "AnisoAlign": "aniso_ext.align",
    "Frame": "aniso_ext.ops",
    "convert_embeddings": "aniso_ext.convert",
    "list_aligners": "aniso_ext.align",
    "load_aligner": "aniso_ext.align",
    "make_aligner": "aniso_ext.align",
}
_SUBPACKAGES = ("align", "convert", "data", "diagnostics", "encode", "errors", "mllm", "ops", "stats", "worlds")

__all__ = ["__version__", *_EXPORTS, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _SUBPACKAGES:
        return import_module(f"aniso_ext.{name}")
    raise AttributeError(f"module 'aniso_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""The operations of the correction, one public function each, and the choice of a backend."""

from aniso_ext.ops.api import correct, correct_sums, decode, encode
from aniso_ext.ops.frame import Frame

__all__ = ["Frame", "backends", "correct", "correct_sums", "decode", "encode", "reference"]


def __getattr__(name: str) -> object:
    if name in ("backends", "reference"):
        from importlib import import_module

        return import_module(f"aniso_ext.ops.{name}")
    raise AttributeError(f"module 'aniso_ext.ops' has no attribute {name!r}")

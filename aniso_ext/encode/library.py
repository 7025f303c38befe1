"""open_clip, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

from aniso_ext.errors import InputError

_torchvision_operators: list[Any] = []
"""Keeps the library of declared operators alive: they vanish with it."""


def open_clip() -> Any:
    """The module ``open_clip``.

    Raises:
        InputError: it is not installed; the message names the extra.
    """
    prepare_torchvision()
    try:
        return importlib.import_module("open_clip")
    except ImportError as error:
        raise InputError(f"open_clip cannot be imported ({error}): pip install 'aniso_ext[encode]'") from None


def prepare_torchvision() -> None:
    """Let a torchvision built for CUDA be imported beside a torch without it; elsewhere nothing happens.

    Its import registers fakes for ``nms`` and ``qnms``, whose schemas come from a binary that such a torch cannot load.
    Only its image transforms are used here, and they are Python.
    """
    import torch

    if torch.version.cuda is not None or _torchvision_operators or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_operators.append(library)

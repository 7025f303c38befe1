"""torchvision beside a torch that its binary was not built for."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

_operators: list[Any] = []
"""Keeps the declared operators alive: they vanish with their library."""


def prepare_torchvision() -> None:
    """Make an installed torchvision importable; nothing happens where it is, or where there is none.

    A torchvision built for CUDA does not find its operators beside a torch without it, and its import fails at the
    first of them; transformers and open_clip import it. Its Python parts need no operator: a declaration is enough.
    """
    import torch

    if _operators or "torchvision" in sys.modules:
        return
    with contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _operators.append(library)

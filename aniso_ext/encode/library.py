"""open_clip, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

from aniso_ext.errors import InputError
from aniso_ext.torchvision import prepare_torchvision


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

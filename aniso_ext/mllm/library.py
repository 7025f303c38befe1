"""transformers, imported on first use; the rest of the package takes it from here."""

from __future__ import annotations

from aniso_ext.errors import InputError
from aniso_ext.torchvision import prepare_torchvision

prepare_torchvision()
try:
    import accelerate  # noqa: F401  the trainer needs it; better missed now than after an hour
    import transformers
except ModuleNotFoundError as error:
    if error.name not in ("accelerate", "transformers"):
        raise
    raise InputError(f"{error.name} is not installed: pip install 'aniso_ext[mllm]'") from None

__all__ = ["say_errors_alone", "transformers"]


def say_errors_alone() -> None:
    """Keep transformers' bars and notes to itself; a command has its own."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

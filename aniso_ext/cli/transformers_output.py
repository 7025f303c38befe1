"""What transformers prints by itself is not for the users of a command."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Leave out its progress bars and remarks; errors stay.

    Raises:
        InputError: transformers is not installed.
    """
    from aniso_ext.mllm.library import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

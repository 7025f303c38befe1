"""Errors that a user can cause or mend.

Every message says what is wrong, with names and numbers, and then what to do. The command line prints an
:class:`AnisoError` as one line and exits with code 1; anything else is a defect of the package.
"""

from __future__ import annotations


class AnisoError(Exception):
    """Base of all errors that the caller can mend."""


class InputError(AnisoError, ValueError):
    """An argument has the wrong shape, width, dtype or value."""


class DataError(AnisoError, ValueError):
    """A file or folder cannot be used; the message names it and the reason."""


class ArtefactError(AnisoError, ValueError):
    """A saved aligner cannot be used; the message names the field that is at fault."""


class BackendUnavailableError(AnisoError, RuntimeError):
    """A backend was asked for by name and is not there; the message says why."""


class NotFittedError(AnisoError, ValueError, AttributeError):
    """An aligner was used before ``fit``."""


class TrainingError(AnisoError, RuntimeError):
    """Training cannot go on: a loss is not finite."""


class WorkerError(AnisoError, RuntimeError):
    """A process that did a part of the work died."""


class StoppedError(AnisoError, RuntimeError):
    """Work was stopped on request; what is finished is kept, and the same call goes on from there."""

"""Checkpoints of a stage: written whole or not at all, read back without unpickling code, refused where foreign."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aniso_ext.align.processes import world
from aniso_ext.errors import DataError

FORMAT = "aniso_ext.training"
FORMAT_VERSION = 1


class Checkpoint:
    """The file of one stage's state.

    Only process 0 writes; every process reads, so the file must lie where all of them see it.

    Args:
        path: the file; its folder is made when needed.
        identity: what the state belongs to (data, options, shapes) by name; a checkpoint of another identity is
            refused, and the message names what differs.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state (tensors, numbers, text, lists and dicts of them): temporary file, fsync, rename."""
        if world()[0] != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": self.identity, "state": dict(state)}
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(whole, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The saved state with its tensors on ``device``, or None where there is no file.

        Raises:
            DataError: the file is damaged, is no checkpoint of this version, or is of another identity.
        """
        if not self.path.is_file():
            return None
        try:
            whole = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"checkpoint {self.path} cannot be read ({reason}): delete it to start again") from None
        header = (whole.get("format"), whole.get("format_version")) if isinstance(whole, dict) else None
        if header != (FORMAT, FORMAT_VERSION):
            raise DataError(f"{self.path} is no checkpoint of this version of aniso_ext: delete it to start again")
        saved = whole["identity"]
        differing = sorted(
            name for name in {*saved, *self.identity} if saved.get(name, None) != self.identity.get(name, None)
        )
        if differing:
            name = differing[0]
            raise DataError(
                f"checkpoint {self.path} is of another run ({', '.join(differing)} differ; {name} was "
                f"{saved.get(name)!r} and is {self.identity.get(name)!r}): delete it, or name another folder"
            )
        state: dict[str, Any] = whole["state"]
        return state

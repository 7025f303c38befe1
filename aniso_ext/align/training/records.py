"""The losses of a stage as JSON lines and, on request, for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aniso_ext.align.processes import world
from aniso_ext.errors import InputError


class TrainingLog:
    """One file ``<folder>/<stage>.jsonl``: a line for each training step and each held-out loss.

    A line is {"step": steps done, "split": "train" or "held_out", "loss": ..., and every named part}. Lines hold no
    times, so equal runs write equal files. A run that goes on from a checkpoint first drops the lines beyond it, also
    one that was cut in the middle. Only process 0 writes.

    Args:
        folder: made when needed.
        tensorboard: also write TensorBoard events into ``<folder>/tensorboard/<stage>``.

    Raises:
        InputError: ``tensorboard`` was asked for and is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, TrainingLog(folder).open("prior", 0) as log:
        ...     log.write(1, "train", {"loss": 0.5})
        ...     log.flush()
        ...     print(log.path.read_text().strip())
        {"step": 1, "split": "train", "loss": 0.5}
    """

    def __init__(self, folder: str | os.PathLike[str], *, tensorboard: bool = False) -> None:
        self.folder = Path(folder)
        self.tensorboard = tensorboard
        if tensorboard:
            _summary_writer()

    def open(self, stage: str, step: int) -> StageLog:
        """The log of a stage that has done ``step`` steps; what was written beyond them is dropped."""
        return StageLog(self.folder, stage, step, self.tensorboard)


class StageLog:
    """The open log of one stage; use it as a context manager."""

    def __init__(self, folder: Path, stage: str, step: int, tensorboard: bool) -> None:
        self.path = folder / f"{stage}.jsonl"
        self._pending: list[str] = []
        self._writes = world()[0] == 0
        self._events: Any = None
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _keep_until(self.path, step)
        if tensorboard:
            self._events = _summary_writer()(str(folder / "tensorboard" / stage), purge_step=step + 1)

    def __enter__(self) -> StageLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._events is not None:
            self._events.close()

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Note values after ``step`` steps; :meth:`flush` brings them to the file."""
        if not self._writes:
            return
        self._pending.append(json.dumps({"step": step, "split": split, **values}))
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        """Append what is pending and bring it to the disk."""
        if self._pending:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join(self._pending) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._pending.clear()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps; a start from nothing drops all."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if step else []:
        try:
            done = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if done <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tensorboard is not installed: pip install 'aniso_ext[tensorboard]', or leave tensorboard=False"
        ) from None
    return SummaryWriter

"""Where a run was made: what a table of times needs in its header."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from aniso_ext import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


def facts(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Name and version of everything that a time depends on; ``commit`` where git cannot be asked."""
    found = {"device": device_name(device)}
    if device.type == "cuda":
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        found["cuda"] = str(torch.version.cuda)
    else:
        found["threads"] = str(torch.get_num_threads())
    return {
        **found,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "aniso_ext": __version__,
        "commit": commit or _commit(),
        "date": str(datetime.date.today()),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.machine()


def short_name(device: torch.device) -> str:
    """For the names of files: `h200` of an NVIDIA H200, `cpu` of any processor."""
    if device.type != "cuda":
        return device.type
    words = [word for word in device_name(device).lower().split() if word not in ("nvidia", "geforce", "tesla")]
    return words[0] if words else device.type


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    inside = _output("git", "rev-parse", "--show-prefix", folder=_PACKAGE)
    if inside.rstrip("/") != _PACKAGE.name:  # an installed copy, perhaps inside someone else's repository
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", folder=_PACKAGE)
    return _output("git", "rev-parse", "--short=10", "HEAD", folder=_PACKAGE) + (" with changes" if changed else "")


def _output(*command: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"

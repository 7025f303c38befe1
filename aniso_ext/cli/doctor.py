"""``aniso doctor``: what is installed, what can run here, and what ``auto`` picks and why."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aniso_ext.cli.console import Debug, Json, Result, command, one_line

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("aniso_ext", "torch", "numpy", "safetensors", "pyarrow", "huggingface_hub", "typer", "rich", "triton")
IMPORTS = ("aniso_ext", "torch", "aniso_ext.ops")


@command
def doctor(json: Json = False, debug: Debug = False) -> Result:
    """Show versions, the build, the processor, the backends with the reason why one is missing, and import times.

    Paste its output into a bug report.
    """
    data = {
        "command": "doctor",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "build": _build(),
        "processor": _processor(),
        "cuda": _cuda(),
        "backends": _backends(),
        "import_seconds": {name: _import_seconds(name) for name in IMPORTS},
    }
    return Result(data, lambda console: _show(console, data))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _build() -> dict[str, Any]:
    """What the compiled module says of itself, or why it cannot be asked."""
    try:
        from aniso_ext import _build_info
    except ImportError as error:
        return {"compiled": False, "reason": one_line(error)}
    facts = {name: getattr(_build_info, name) for name in dir(_build_info) if not name.startswith("_")}
    return {"compiled": True, **{name: fact() if callable(fact) else fact for name, fact in facts.items()}}


def _processor() -> dict[str, Any]:
    import torch

    return {
        "model": _processor_model(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    import torch

    def described(index: int) -> str:
        major, minor = torch.cuda.get_device_capability(index)
        return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"

    devices = [described(index) for index in range(torch.cuda.device_count())]
    return {"torch_built_for": torch.version.cuda, "devices": devices}


def _backends() -> dict[str, Any]:
    import torch

    from aniso_ext.ops import backends

    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "unavailable": {name: reason for name, reason in backends.available().items() if reason is not None},
        "available": [name for name, reason in backends.available().items() if reason is None],
        "auto": {kind: backends.explain(kind) for kind in kinds},
        "overridden_by_environment": os.environ.get("ANISO_BACKEND"),
    }


def _import_seconds(module: str) -> float | None:
    """Seconds that a fresh interpreter needs to import a module; None if it cannot."""
    program = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _show(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def section(title: str, lines: list[str]) -> None:
        for index, line in enumerate(lines):
            table.add_row(title if index == 0 else "", line)

    section("versions", [", ".join(f"{name} {found or 'not installed'}" for name, found in data["versions"].items())])
    section("platform", [data["platform"]])
    section("build", _pairs(data["build"]))
    section("processor", _pairs(data["processor"]))
    section("cuda", _pairs(data["cuda"]))
    found = data["backends"]
    section(
        "backends",
        [f"{name}: available" for name in found["available"]]
        + [f"{name}: not available, {reason}" for name, reason in found["unavailable"].items()],
    )
    section("auto", list(found["auto"].values()))
    if found["overridden_by_environment"]:
        section("", [f"ANISO_BACKEND={found['overridden_by_environment']} overrides auto"])
    times = data["import_seconds"].items()
    section("import", [", ".join(f"{name} {'fails' if took is None else f'{took:.2f} s'}" for name, took in times)])
    console.print(table)


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')}: {'none' if value in (None, []) else value}" for name, value in values.items()]

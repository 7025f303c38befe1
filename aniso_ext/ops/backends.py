"""One choice of implementation with reasons: ``auto | cuda | triton | cpu | reference``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from aniso_ext.errors import BackendUnavailableError, InputError
from aniso_ext.ops import cuda_native, native, reference
from aniso_ext.ops.frame import Frame
from aniso_ext.ops.tracing import constant_while_tracing


@dataclass(frozen=True)
class Backend:
    """A set of the operations for one kind of device."""

    name: str
    device_type: str | None
    correct: Callable[..., torch.Tensor]
    correct_sums: Callable[..., torch.Tensor]
    encode: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]

    def accepts(self, device: torch.device) -> bool:
        return self.device_type is None or self.device_type == device.type


def _on_device(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The reference computes where its rows are, so its frame follows them."""

    def run(rows: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        *others, frame = arguments
        return function(rows, *others, frame.to(device=rows.device), **options)

    return run


REFERENCE = Backend(
    "reference",
    None,
    _on_device(reference.correct),
    _on_device(reference.correct_sums),
    _on_device(reference.encode),
    _on_device(reference.decode),
)
CPU = Backend("cpu", "cpu", native.correct, native.correct_sums, native.encode, native.decode)
CUDA = Backend("cuda", "cuda", cuda_native.correct, cuda_native.correct_sums, cuda_native.encode, cuda_native.decode)
_IMPLEMENTED = {backend.name: backend for backend in (CUDA, CPU, REFERENCE)}

_NO_TRITON = "this version has no Triton kernels; the reference runs on that device"


@cache
def available() -> dict[str, str | None]:
    """Every backend with None if it can run here, else the reason why not."""
    reasons: dict[str, str | None] = {}
    reasons["cuda"] = cuda_native.probe()
    reasons["triton"] = _NO_TRITON
    reasons["cpu"] = native.probe()
    reasons["reference"] = None
    return reasons


def explain(device: torch.device | str = "cpu") -> str:
    """In one line, which backend ``auto`` takes for tensors on a device, and why not a faster one."""
    device = torch.device(device)
    chosen = _automatic(device)
    rejected = [f"{name}: {reason}" for name, reason in available().items() if reason is not None]
    return f"auto on {device.type} takes {chosen.name}" + (f" ({'; '.join(rejected)})" if rejected else "")


def resolve(name: str, rows: torch.Tensor, frame: Frame) -> Backend:
    """The backend for these rows.

    ``auto`` can be overridden by the environment variable ``ANISO_BACKEND``.

    Raises:
        InputError: the name is unknown, or the named backend does not run on the rows' device.
        BackendUnavailableError: the named backend is not there; the message says why.
    """
    return _IMPLEMENTED[_choose(name, str(rows.device))]


@constant_while_tracing  # torch.compile cannot trace the probe, and must not repeat it
def _choose(name: str, device: str) -> str:
    if name == "auto":
        name = os.environ.get("ANISO_BACKEND", "auto")
    if name == "auto":
        return _automatic(torch.device(device)).name
    reasons = available()
    if name not in reasons:
        raise InputError(f"unknown backend {name!r}: choose one of auto, {', '.join(reasons)}")
    if reasons[name] is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reasons[name]}")
    if not _IMPLEMENTED[name].accepts(torch.device(device)):
        kind = _IMPLEMENTED[name].device_type
        raise InputError(f"backend {name!r} runs on {kind} tensors, got {device}: move them, or use backend='auto'")
    return name


def _automatic(device: torch.device) -> Backend:
    # only the probe of the rows' own device runs: choosing for CPU rows must not start CUDA
    if CUDA.accepts(device) and cuda_native.probe() is None:
        return CUDA
    if CPU.accepts(device) and native.probe() is None:
        return CPU
    return REFERENCE

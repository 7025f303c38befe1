"""One choice of implementation with reasons: ``auto | cuda | triton | cpu | reference``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from aniso_ext.errors import BackendUnavailableError, InputError
from aniso_ext.ops import cuda_native, hopper, native, reference
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
    correct_into: Callable[..., None] | None = None
    """``correct`` that writes to the memory given to it; None if its result can only be copied there."""

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
CPU = Backend(
    "cpu", "cpu", native.correct, native.correct_sums, native.encode, native.decode, correct_into=native.correct_into
)
CUDA = Backend("cuda", "cuda", cuda_native.correct, cuda_native.correct_sums, cuda_native.encode, cuda_native.decode)


def _triton(name: str) -> Callable[..., torch.Tensor]:
    """A function of the Triton backend, which is imported when it is first called."""

    def run(*arguments: Any, **options: Any) -> torch.Tensor:
        function: Callable[..., torch.Tensor] = getattr(_triton_backend(), name)
        return function(*arguments, **options)

    return run


def _triton_backend() -> Any:
    from aniso_ext.ops.triton import backend

    return backend


# Triton's interpreter runs the kernels on the CPU.
_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = Backend(
    "triton",
    "cpu" if _INTERPRETER else "cuda",
    _triton("correct"),
    _triton("correct_sums"),
    _triton("encode"),
    _triton("decode"),
)
_IMPLEMENTED = {backend.name: backend for backend in (CUDA, TRITON, CPU, REFERENCE)}


@cache
def _triton_reason() -> str | None:
    """Why the Triton kernels cannot serve as a backend, or None after a first launch of one."""
    if not _INTERPRETER and not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        reason: str | None = _triton_backend().probe()
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the one that belongs to torch {torch.__version__}"
    return reason


def _unsupported(name: str, dtype: torch.dtype, rank: int) -> str | None:
    """None, or why a backend that works here cannot serve these rows."""
    if name != "triton":
        return None
    reason: str | None = _triton_backend().supports(dtype, rank)
    return reason


def ranking(
    device: torch.device, operation: str, dtype: torch.dtype, width: int, rank: int, complement: str, gradient: bool
) -> tuple[str, ...]:
    """Names of the backends that ``auto`` tries in turn for an operation on rows of a kind, the fastest first.

    ``gradient``: whether a backward will follow, which runs on the same backend. The order on GPUs is that of
    benchmarks/results/h100_kernels.csv: Hopper's own kernels where they serve, then Triton's, then the portable ones,
    which are exact and the only ones for float64. IEEE float32 goes to the portable ones as well.
    """
    if device.type == "cpu":
        return ("cpu", "reference")
    if operation == "decode":
        on_hopper = hopper.aligns(rank)
    else:
        operations = {"scalar": ("correct", "correct_sums", "encode"), "diagonal": ("correct",)}
        differentiable = hopper.serves_gradient(operation, dtype, width, rank, scalar=complement == "scalar")
        aligned = operation != "encode" or hopper.aligns(rank)
        forward_only = operation == "correct_sums" or not gradient
        on_hopper = operation in operations.get(complement, ()) and (forward_only or (differentiable and aligned))
    widely = (operation, complement) == ("correct", "scalar")
    serves = hopper.serves_correct if widely else hopper.serves
    if on_hopper and serves(str(device), dtype, width, rank):
        return ("cuda", "triton", "reference")
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return ("cuda", "triton", "reference")
    return ("triton", "cuda", "reference")


# Only the probe of a backend that may be taken runs: choosing one for rows on the CPU must not start CUDA.
_PROBES: dict[str, Callable[[], str | None]] = {
    "cuda": lambda: cuda_native.probe(),
    "triton": _triton_reason,
    "cpu": lambda: native.probe(),
    "reference": lambda: None,
}


@cache
def available() -> dict[str, str | None]:
    """Every backend with None if it can run here, else the reason why not."""
    return {name: probe() for name, probe in _PROBES.items()}


def explain(device: torch.device | str = "cpu") -> str:
    """In one line, which backend ``auto`` takes for ``correct`` on a device, and why not another one."""
    device = torch.device(device)
    chosen = _automatic(device, "correct", torch.bfloat16, 1280, 128, "scalar", False)
    rejected = [f"{name}: {reason}" for name, reason in available().items() if reason is not None]
    return f"auto on {device.type} takes {chosen}" + (f" ({'; '.join(rejected)})" if rejected else "")


def resolve(name: str, rows: torch.Tensor, frame: Frame, operation: str = "correct") -> Backend:
    """The backend for these rows.

    ``auto`` can be overridden by the environment variable ``ANISO_BACKEND``.

    Raises:
        InputError: the name is unknown, or the named backend does not run on the rows' device or dtype.
        BackendUnavailableError: the named backend is not there; the message says why.
    """
    gradient = rows.requires_grad and torch.is_grad_enabled()
    kind = (operation, rows.dtype, frame.width, frame.rank, frame.complement, gradient)
    return _IMPLEMENTED[_choose(name, str(rows.device), *kind)]


@constant_while_tracing  # torch.compile cannot trace the probe, and must not repeat it
def _choose(
    name: str, device: str, operation: str, dtype: torch.dtype, width: int, rank: int, complement: str, gradient: bool
) -> str:
    if name == "auto":
        name = os.environ.get("ANISO_BACKEND", "auto")
    if name == "auto":
        return _automatic(torch.device(device), operation, dtype, width, rank, complement, gradient)
    if name not in _PROBES:
        raise InputError(f"unknown backend {name!r}: choose one of auto, {', '.join(_PROBES)}")
    reason = _PROBES[name]()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    backend = _IMPLEMENTED[name]
    if not backend.accepts(torch.device(device)):
        raise InputError(
            f"backend {name!r} runs on {backend.device_type} tensors, got {device}: move them, or use backend='auto'"
        )
    if (reason := _unsupported(name, dtype, rank)) is not None:
        raise InputError(f"backend {name!r} {reason}")
    return name


def _automatic(
    device: torch.device, operation: str, dtype: torch.dtype, width: int, rank: int, complement: str, gradient: bool
) -> str:
    for name in ranking(device, operation, dtype, width, rank, complement, gradient):
        works = _IMPLEMENTED[name].accepts(device) and _PROBES[name]() is None
        if works and _unsupported(name, dtype, rank) is None:
            return name
    return REFERENCE.name

"""What the machine can do at all, measured in the run that is compared with it: copies and matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from aniso_ext.bench.suite import FORMATS
from aniso_ext.bench.timing import interleaved

_COPIED_BYTES = {"cuda": 4 * 2**30, "cpu": 2**28}
_GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
_ROUNDS = {"cuda": 20, "cpu": 5}


@dataclass(frozen=True)
class Ceilings:
    """Bytes of a copy count twice, read and written."""

    copy_gb_per_s: float
    gemm_tflop_per_s: dict[str, float]  # by format


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(device: torch.device, formats: Sequence[str] = tuple(FORMATS)) -> Ceilings:
    """Medians on random data; zeros would be faster than real data can be."""
    return Ceilings(_copy(device), {format: _gemm(device, format) for format in dict.fromkeys(formats)})


def _copy(device: torch.device) -> float:
    count = _COPIED_BYTES[device.type]
    if device.type == "cuda":
        count = min(count, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.empty(count // 4, device=device).normal_()
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda _: target.copy_(source)}, device, _ROUNDS[device.type])
    return 2 * source.numel() * source.itemsize / times["copy"].median / 1e9


def _gemm(device: torch.device, format: str) -> float:
    dtype, precision = FORMATS[format]
    size = _GEMM_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    with matmul_precision(precision):
        times = interleaved({"gemm": lambda _: torch.mm(left, right, out=out)}, device, _ROUNDS[device.type])
    return 2 * size**3 / times["gemm"].median / 1e12

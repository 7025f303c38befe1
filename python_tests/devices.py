"""Where tests of the operators run: a backend, the device of its rows, and a number format.

A test takes the fixture ``run``, parametrised by :func:`runs` or :func:`cases_and_runs`. Runs on a GPU carry the marker
``gpu`` and are skipped, with the reason, where their backend cannot run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from cases import Case, deltas_of, rows_of

# name: (dtype of the rows, torch.get_float32_matmul_precision())
FORMATS = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}
EVERY_FORMAT = tuple(FORMATS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_OF = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda", "triton": "cpu" if INTERPRETED else "cuda"}
EVERY_BACKEND = tuple(DEVICE_OF)
KERNELS = ("cpu", "cuda", "triton")
ON_GPU = ("cuda", "triton")

# 1 - cos to the exact rows. float64: |e - e'|^2/2 with errors of D eps = 3e-13. float16: sums are float32, so that the
# rounding of the output counts, half an ulp of each coordinate: |e - e'| <= 2^-11, 1 - cos <= 2^-23 = 1.2e-7; numbers
# below 2^-14 add less than D (2^-25)^2 = 1e-12. Matrix units of a GPU take coefficients and basis in the format of the
# rows, which rounds them once more.
_COSINE_LOSS = {"float64": 1e-25, "float32": 1e-10, "tf32": 1e-6, "bfloat16": 2e-5, "float16": 1.25e-7}
_COSINE_LOSS_ON_GPU = {**_COSINE_LOSS, "float16": 1e-6}


@dataclass(frozen=True)
class Run:
    """One backend in one format."""

    backend: str
    format: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.format}"

    @property
    def device(self) -> torch.device:
        return torch.device(DEVICE_OF[self.backend])

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[self.format][0]

    @property
    def precision(self) -> str:
        return FORMATS[self.format][1]

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def cosine_loss(self) -> float:
        """The largest 1 - cos of the accuracy contract."""
        return (_COSINE_LOSS_ON_GPU if self.backend in ON_GPU else _COSINE_LOSS)[self.format]

    def rows(self, case: Case, rows: int, *, seed: int = 0) -> torch.Tensor:
        return rows_of(case, rows, self.dtype, seed=seed).to(self.device)

    def deltas(self, case: Case, rows: int, *, seed: int = 0) -> torch.Tensor:
        return deltas_of(case, rows, self.dtype, seed=seed).to(self.device)

    def missing(self) -> str | None:
        """Why this cannot run here."""
        from aniso_ext.ops import backends

        if self.device.type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        reason = backends.available()[self.backend]
        return None if reason is None else f"backend {self.backend!r} is not available: {reason}"


def runs(
    backends: Sequence[str], formats: Sequence[str] = EVERY_FORMAT, fewer: Mapping[str, Sequence[str]] | None = None
) -> pytest.MarkDecorator:
    """Parametrise ``run`` over backends and the formats that each has; ``fewer`` limits those of a backend."""
    limits = {backend: formats for backend in backends} | dict(fewer or {})
    found = [
        Run(backend, format)
        for format in formats
        for backend in backends
        if _has(backend, format) and format in limits[backend]
    ]
    return pytest.mark.parametrize("run", [_parameter(run) for run in found], indirect=True)


def widest(backends: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrise ``run`` over backends, each in its widest format: Triton has no float64."""
    found = [Run(backend, "float32" if backend == "triton" else "float64") for backend in backends]
    return pytest.mark.parametrize("run", [_parameter(run) for run in found], indirect=True)


def cases_and_runs(
    cases: Sequence[Case], backends: Sequence[str], formats: Sequence[str] = EVERY_FORMAT
) -> pytest.MarkDecorator:
    """Parametrise ``case`` and ``run`` together; the runs of one case and format follow each other."""
    found = list(_cases_and_runs(cases, backends, formats))
    ids = [f"{case}-{run}" for case, run in found]
    values = [pytest.param(case, run, marks=_marks(run)) for case, run in found]
    return pytest.mark.parametrize("case, run", values, ids=ids, indirect=["run"])


def _cases_and_runs(
    cases: Sequence[Case], backends: Sequence[str], formats: Sequence[str]
) -> Iterator[tuple[Case, Run]]:
    for case in cases:
        for format in formats:
            for backend in backends:
                if _has(backend, format) and (backend != "triton" or _worth_compiling(case, format)):
                    yield case, Run(backend, format)


def _worth_compiling(case: Case, format: str) -> bool:
    """Triton compiles for every shape, format and branch, a second each: two formats of every branch, each complement
    calibrated, and all formats of frames that are fitted like real ones."""
    scalar = case.complement == "scalar"
    exact_basis = case.basis_dtype == "float64"
    if format in ("float32", "bfloat16"):
        return scalar or (case.calibrated and (exact_basis or case.complement == "diagonal_projected"))
    return scalar and case.calibrated and case.width <= 128 and not case.center and exact_basis


def _has(backend: str, format: str) -> bool:
    if format == "float64":
        return backend != "triton"
    return format != "tf32" or backend in ON_GPU


def _marks(run: Run) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if run.backend in ON_GPU else []


def _parameter(run: Run) -> object:
    return pytest.param(run, marks=_marks(run), id=str(run))

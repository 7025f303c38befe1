"""Choice of a backend: overrides, reasons, a missing library, and every instruction set of the CPU kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import BRANCHES, frame_of, rows_of

from aniso_ext import _build_info, ops
from aniso_ext.errors import AnisoError, BackendUnavailableError, InputError
from aniso_ext.ops import backends, native

CASE = BRANCHES[1]
HERE = Path(__file__).resolve().parent


def names() -> list[str]:
    return ["cuda", "triton", "cpu", "reference"]


def test_the_compiled_kernels_work_here():
    """The suite tests them; a build that fell back to the reference must not pass for them."""
    assert backends.available()["cpu"] is None
    assert list(backends.available()) == names()


def test_auto_takes_the_kernels_on_cpu_and_says_why_nothing_faster():
    y = rows_of(CASE, 3)
    assert backends.resolve("auto", y, frame_of(CASE)).name == "cpu"
    line = backends.explain()
    assert line.startswith("auto on cpu takes cpu (") and "\n" not in line
    for name, reason in backends.available().items():
        assert (reason is None) == (f"{name}: " not in line)
        assert reason is None or reason in line


def test_auto_takes_the_reference_where_no_kernel_runs():
    assert backends.resolve("auto", torch.empty(0, device="meta"), frame_of(CASE)).name == "reference"
    assert backends.explain("meta").startswith("auto on meta takes reference")


def test_the_environment_overrides_auto_alone(monkeypatch):
    y, frame = rows_of(CASE, 3), frame_of(CASE)
    monkeypatch.setenv("ANISO_BACKEND", "reference")
    assert backends.resolve("auto", y, frame).name == "reference"
    assert backends.resolve("cpu", y, frame).name == "cpu"
    monkeypatch.setenv("ANISO_BACKEND", "fastest")
    with pytest.raises(
        InputError, match=r"unknown backend 'fastest': choose one of auto, cuda, triton, cpu, reference"
    ):
        ops.correct(y, frame)
    monkeypatch.setenv("ANISO_BACKEND", "auto")
    assert backends.resolve("auto", y, frame).name == "cpu"


@pytest.mark.parametrize("operation", ["correct", "encode"])
def test_unknown_backends_are_named(operation):
    with pytest.raises(InputError, match="unknown backend 'gpu'"):
        getattr(ops, operation)(rows_of(CASE, 3), frame_of(CASE), backend="gpu")


def test_unavailable_backends_raise_with_their_reason():
    missing = {name: reason for name, reason in backends.available().items() if reason is not None}
    assert missing, "no machine has every backend of this version"
    for name, reason in missing.items():
        with pytest.raises(BackendUnavailableError) as raised:
            ops.correct(rows_of(CASE, 3), frame_of(CASE), backend=name)
        assert str(raised.value) == f"backend {name!r} is not available: {reason}"
        assert isinstance(raised.value, AnisoError) and isinstance(raised.value, RuntimeError)


def test_a_backend_refuses_rows_of_another_device():
    rows = torch.empty(3, CASE.width, device="meta")
    with pytest.raises(InputError, match="backend 'cpu' runs on cpu tensors, got meta: move them"):
        ops.correct(rows, frame_of(CASE), backend="cpu")


@pytest.fixture
def package_folder(monkeypatch, tmp_path):
    """The folder where the compiled library is looked for; empty unless the test fills it."""

    def forget() -> None:
        native.probe.cache_clear()
        backends.available.cache_clear()

    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def test_without_the_library_the_reference_runs_and_says_why(package_folder):
    reason = backends.available()["cpu"]
    assert "not built" in reason
    assert backends.explain().startswith("auto on cpu takes reference") and reason in backends.explain()
    y, frame = rows_of(CASE, 3), frame_of(CASE)
    assert torch.equal(ops.correct(y, frame), ops.correct(y, frame, backend="reference"))
    with pytest.raises(BackendUnavailableError, match="not built"):
        ops.correct(y, frame, backend="cpu")


def test_a_library_that_cannot_be_loaded_is_a_reason_and_no_crash(package_folder):
    (package_folder / "_C.abi3.so").write_bytes(b"not a library")
    reason = backends.available()["cpu"]
    assert f"do not work with torch {torch.__version__}" in reason and reason.endswith("build again")
    assert "\n" not in reason
    assert backends.resolve("auto", rows_of(CASE, 3), frame_of(CASE)).name == "reference"


def test_a_library_whose_kernels_fail_is_not_chosen(package_folder, monkeypatch):
    """The probe launches a kernel: a library that loads but registers nothing must not count as working."""
    (package_folder / "_C.abi3.so").write_bytes(b"")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)

    def fails(*arguments):
        raise NotImplementedError("no kernel for CPU\nlong explanation")

    monkeypatch.setattr(torch.ops.aniso_ext, "decode", fails)
    assert "no kernel for CPU" in backends.available()["cpu"]
    assert "long explanation" not in backends.available()["cpu"]


def test_the_probe_ignores_the_default_dtype_and_device(monkeypatch):
    native.probe.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            assert native.probe() is None
    finally:
        torch.set_default_dtype(before)


# Printed: the instruction set, then per dtype the largest squared errors, halved, of `correct`, `decode` and the v0 of
# `encode`, and the relative error of the gradient of `correct`.
COMPARE = """
import json, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
import oracle
from aniso_ext import _build_info, ops
from cases import BRANCHES, arrays_of, deltas_of, frame_of, rows_of

torch.set_num_threads(1)
errors = {}
for case in BRANCHES:
    arrays, frame = arrays_of(case), frame_of(case)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        y, deltas = rows_of(case, 70, dtype), deltas_of(case, 70, dtype)
        state = ops.encode(y, frame, backend="cpu")
        exact = [
            oracle.correct(y.double().numpy(), arrays, case.complement),
            oracle.decode(state.double().numpy(), deltas.double().numpy(), arrays),
            oracle.encode(y.double().numpy(), arrays, case.complement)[:, 3 * case.blocks :],
        ]
        ours = [
            ops.correct(y, frame, backend="cpu"),
            ops.decode(state, deltas, frame, backend="cpu"),
            state[:, 3 * case.blocks :],
        ]
        y = y.requires_grad_()
        gradients = [
            torch.autograd.grad(ops.correct(y.to(kind), frame, backend=backend).sin().sum(), y)[0].double()
            for backend, kind in (("cpu", dtype), ("reference", torch.float64))
        ]
        worst = [0.5 * np.square(z.double().numpy() - e).sum(axis=1).max() for z, e in zip(ours, exact)]
        worst.append(float((gradients[0] - gradients[1]).norm() / gradients[1].norm()))
        errors[str(dtype)] = np.maximum(worst, errors.get(str(dtype), 0)).tolist()
print(json.dumps({"isa": _build_info.instruction_set(), "errors": errors}))
"""
# 1 - cos as in test_ops_values; v0 has length below 1 and no further sums, so that the same bounds hold. A gradient is
# two passes over the row away: its relative error is at most twice that of rows, sqrt(2 (1 - cos)).
LARGEST = {"torch.float64": 1e-25, "torch.float32": 1e-10, "torch.bfloat16": 2e-5, "torch.float16": 1.25e-7}
ORDER = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("wanted", ORDER)
def test_every_instruction_set_agrees_with_the_oracle(wanted):
    environment = {**os.environ, "ANISO_CPU_ISA": wanted, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPARE, str(HERE)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    # the variable lowers the choice, and asking for more than the processor has changes nothing
    best = _build_info.instruction_set() if "ANISO_CPU_ISA" not in os.environ else report["isa"]
    assert report["isa"] == min(wanted, best, key=ORDER.index)
    for dtype, (correct, decode, complement, gradient) in report["errors"].items():
        assert max(correct, decode, complement) <= LARGEST[dtype], dtype
        assert gradient <= 2 * (2 * LARGEST[dtype]) ** 0.5, dtype

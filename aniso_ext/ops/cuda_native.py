"""The compiled CUDA kernels behind the operators: any GPU from sm_80 on, every dtype."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from aniso_ext.ops import hopper, native
from aniso_ext.ops.frame import Frame
from aniso_ext.ops.operands import Operands, operands
from aniso_ext.ops.reference import compute_dtype
from aniso_ext.ops.tracing import constant_while_tracing

# cudaGetErrorString of cudaErrorNoKernelImageForDevice and of what older drivers return instead
_NO_IMAGE = ("no kernel image", "invalid device function")


def _built_for() -> str | None:
    """The GPU architectures of this build; None if it has no CUDA kernels."""
    try:
        from aniso_ext import _build_info
    except ImportError:
        return None
    return None if _build_info.cuda_version == "none" else str(_build_info.cuda_architectures)


@cache
def probe() -> str | None:
    """Load the kernels and launch one on the current GPU; None when it worked, else the reason why not."""
    architectures = _built_for()
    if architectures is None:
        return "no CUDA kernels were built (ANISO_CUDA=1 pip install --no-build-isolation . builds them)"
    broken = native.probe()
    if broken is not None:
        return broken
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        # inputs by copy from the host: no kernel of torch itself takes part
        rows = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float32, device="cpu").to("cuda")
        basis = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float32, device="cpu").to("cuda")
        result = torch.ops.aniso_ext.decode(rows, rows[:, :4], basis, None, 0.0, 0.0, 0.0, True).cpu()
    except (OSError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if any(text in reason for text in _NO_IMAGE):
            return _no_image(architectures)
        return f"a first kernel failed: {reason}"
    if result.tolist() != [[1.0, 0.0]]:
        return f"a first kernel gave {result.tolist()[0]} instead of [1.0, 0.0]"
    return None


def _no_image(architectures: str) -> str:
    major, minor = torch.cuda.get_device_capability()
    return (
        f"the kernels were built for {architectures}, none of which runs on this GPU, sm_{major}{minor} "
        f'(TORCH_CUDA_ARCH_LIST="{major}.{minor}" ANISO_CUDA=1 pip install --no-build-isolation . builds them for it)'
    )


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(native.library())


@constant_while_tracing
def _follow_float32_precision() -> None:
    """Products of float32 rows take the tensor cores where torch's own may: not at "highest"."""
    _library().aniso_cuda_split_float32(int(torch.get_float32_matmul_precision() != "highest"))


def _folded(rows: torch.Tensor, frame: Frame) -> Operands:
    if rows.dtype == torch.float32:
        _follow_float32_precision()
    working = compute_dtype(rows.dtype)
    return operands(frame, working, working, rows.device)


def correct(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    constants = _folded(y, frame)
    special = None
    if frame.complement != "diagonal_projected":
        serves = hopper.serves_correct if frame.complement == "scalar" else hopper.serves
        special = hopper.operands(y, frame, serves)
    if special is not None:
        return torch.ops.aniso_ext.hopper_correct(y, *special.tensors(), *constants.initialisation(), constants.shift)
    return torch.ops.aniso_ext.correct(y, *constants.initialisation(), constants.shift)


def correct_sums(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    constants = _folded(y, frame)
    special = hopper.operands(y, frame) if frame.complement == "scalar" else None
    if special is not None:
        return torch.ops.aniso_ext.hopper_correct_sums(y, *special.tensors(), *constants.initialisation())
    return torch.ops.aniso_ext.correct_sums(y, *constants.initialisation())


def encode(y: torch.Tensor, frame: Frame) -> torch.Tensor:
    constants = _folded(y, frame)
    special = hopper.operands(y, frame) if frame.complement == "scalar" and hopper.aligns(frame.rank) else None
    if special is not None:
        return torch.ops.aniso_ext.hopper_encode(y, *special.tensors(), *constants.initialisation())
    return torch.ops.aniso_ext.encode(y, *constants.initialisation())


def decode(
    state: torch.Tensor,
    deltas: torch.Tensor,
    frame: Frame,
    *,
    a_theta: float,
    a_rho: float,
    a_v: float,
    literal: bool,
    projected: bool,
) -> torch.Tensor:
    constants = _folded(state, frame)
    if literal and not projected:
        deltas = native.project_moves(deltas, frame)
    update = (constants.basis, constants.shift, a_theta, a_rho, a_v, not literal)
    shuffled = hopper.shuffled_basis(state, frame)
    if shuffled is not None:
        return torch.ops.aniso_ext.hopper_decode(state, deltas, shuffled, *update)
    return torch.ops.aniso_ext.decode(state, deltas, *update)

"""The measure of the accuracy contract: PyTorch compositions on the device of the rows, from the arrays of a case."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from aniso_ext.bench import compositions
from aniso_ext.bench.compositions import rounded

Arrays = Mapping[str, np.ndarray]


def correct(y: torch.Tensor, arrays: Arrays, complement: str, center: bool = False) -> torch.Tensor:
    return compositions.correct(y, rounded(arrays, y.dtype, y.device), complement, center)


def encode(y: torch.Tensor, arrays: Arrays, complement: str, center: bool = False) -> torch.Tensor:
    return compositions.encode(y, rounded(arrays, y.dtype, y.device), complement, center)


def decode(state: torch.Tensor, deltas: torch.Tensor, arrays: Arrays, *, literal: bool = False) -> torch.Tensor:
    return compositions.decode(state, deltas, rounded(arrays, state.dtype, state.device), literal=literal)

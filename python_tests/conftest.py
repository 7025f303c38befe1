"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def real_data_folder() -> Path | None:
    """The folder of real embeddings, or None: ``ANISO_DATA``, else ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("ANISO_DATA", REPOSITORY.parent / "shared" / "data"))
    return folder if (folder / "fashion44k" / "image.npy").is_file() else None


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = real_data_folder()
    if folder is None:
        pytest.skip("no real embeddings: set ANISO_DATA to a folder that holds fashion44k/image.npy")
    return folder


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[object]:
    """A ``devices.Run`` that can run here, with the precision of float32 products that it names."""
    reason = request.param.missing()
    if reason is not None:
        pytest.skip(reason)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param.precision)
    yield request.param
    torch.set_float32_matmul_precision(before)

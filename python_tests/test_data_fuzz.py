"""A hundred of the random conversions of benchmarks/fuzz_convert.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conversion_fuzz import check, draw


@pytest.mark.parametrize("block", range(4))
def test_random_conversions_equal_the_oracle(tmp_path: Path, block: int) -> None:
    for number in range(25 * block, 25 * block + 25):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(draw(np.random.default_rng((1, number))), folder)

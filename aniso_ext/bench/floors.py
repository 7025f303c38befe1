"""The fewest bytes and operations of a case, and the time below which no implementation can come."""

from __future__ import annotations

from dataclasses import dataclass

from aniso_ext.bench.ceilings import Ceilings
from aniso_ext.bench.suite import BenchCase

# Products of D x R for one row with the scalar complement, 2 D R operations each. Forward: one projection, one rebuild;
# the sums need no rebuild, sum_i Q k_i / n_i = Q sum_i k_i / n_i. Backward of correct and encode: both inputs are
# projected, the gradient is rebuilt. Backward of decode: the step is projected and the row rebuilt, then its gradient
# is projected and that of the step rebuilt.
_PRODUCTS = {
    ("correct", False): 2,
    ("correct_sums", False): 1,
    ("encode", False): 2,
    ("decode", False): 2,
    ("encode_decode", False): 4,
    ("correct", True): 3,
    ("encode", True): 3,
    ("decode", True): 4,
}


@dataclass(frozen=True)
class Work:
    """What one row costs at least."""

    bytes: int
    flop: int

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flop / self.bytes

    def floor_ns(self, ceilings: Ceilings, format: str) -> float:
        """Nanoseconds for one row: the larger of bytes at copy speed and operations at the speed of a product."""
        return max(self.bytes / ceilings.copy_gb_per_s, self.flop / ceilings.gemm_tflop_per_s[format] / 1e3)


def work_of(case: BenchCase) -> Work:
    """Each input element read once, each output element written once; constants of the frame count for nothing.

    Elements for one row, with the state of 3M + D and the deltas of 2M + D numbers:

    ============== ======================================================= =============
    operation      forward                                                 backward
    ============== ======================================================= =============
    correct        D read, D written                                       3 D
    correct_sums   D read                                                  -
    encode         D read, 3M + D written                                  3 D + 3 M
    decode         2 D + 5 M read, D written                               5 D + 10 M
    encode_decode  both, as the network between them meets the state       -
    ============== ======================================================= =============

    Operations are those of the matrix products, 2 D R each; the diagonal complement has one more, as
    W_out = [Q, -D_V Q]. Elementwise work is left out.
    """
    problem = case.problem
    width, rank, blocks = problem.width, problem.rank, problem.blocks
    elements = {
        ("correct", False): 2 * width,
        ("correct_sums", False): width,
        ("encode", False): 2 * width + 3 * blocks,
        ("decode", False): 3 * width + 5 * blocks,
        ("encode_decode", False): 5 * width + 8 * blocks,
        ("correct", True): 3 * width,
        ("encode", True): 3 * width + 3 * blocks,
        ("decode", True): 5 * width + 10 * blocks,
    }[case.operation, case.backward]
    products = _PRODUCTS[case.operation, case.backward] + (problem.complement != "scalar")
    return Work(bytes=elements * case.dtype.itemsize, flop=2 * width * rank * products)

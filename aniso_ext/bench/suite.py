"""The cases of ``aniso bench kernels``: what is timed, in which format, and the goal that it has."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aniso_ext.bench.problems import Case
from aniso_ext.errors import InputError

# operation: (inputs that the rows of a batch bring, whether the result is unit rows)
OPERATIONS = {
    "correct": (("y",), True),
    "correct_sums": (("y",), False),
    "encode": (("y",), False),
    "decode": (("state", "deltas"), True),
    "encode_decode": (("y", "deltas"), True),
}
FORMATS = {"bf16": (torch.bfloat16, "highest"), "fp32": (torch.float32, "highest"), "tf32": (torch.float32, "high")}


@dataclass(frozen=True)
class Goal:
    """What a kernel should reach; both limits count."""

    floors: float  # as a multiple of the floor
    over_compiled: float = 2.0  # times faster than torch.compile of the same variant

    def limit(self, floor: float) -> float:
        """Nanoseconds for each row."""
        return self.floors * floor

    def met(self, ns_per_row: float, floor: float, compiled: float | None) -> bool | None:
        """None where torch.compile was not timed and only its part is open."""
        if ns_per_row > self.limit(floor):
            return False
        return None if compiled is None else compiled >= self.over_compiled * ns_per_row


def _on_h200(ns_per_row: float, floor: float) -> Goal:
    """A time that was set for an H200, where ``floor`` was worked out, as a multiple that holds on any GPU."""
    return Goal(floors=ns_per_row / floor)


@dataclass(frozen=True)
class BenchCase:
    """One operation on one problem; ``format`` names the dtype of the rows and the precision of float32 products."""

    name: str
    operation: str
    problem: Case
    format: str
    goal: Goal
    backward: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[self.format][0]

    @property
    def precision(self) -> str:
        return FORMATS[self.format][1]

    @property
    def inputs(self) -> tuple[str, ...]:
        return OPERATIONS[self.operation][0]

    @property
    def unit_rows(self) -> bool:
        return OPERATIONS[self.operation][1] and not self.backward


def _case(
    operation: str,
    width: int,
    rank: int,
    format: str,
    goal: Goal,
    *,
    complement: str = "scalar",
    backward: bool = False,
) -> BenchCase:
    problem = Case(width, rank, knots=1024, complement=complement, calibrated=True, sampled=True)
    parts = [operation, "backward" if backward else "", f"d{width}", f"r{rank}", format]
    parts.append("" if complement == "scalar" else complement)
    return BenchCase("-".join(part for part in parts if part), operation, problem, format, goal, backward)


_BACKWARD = Goal(floors=2.0, over_compiled=3.0)
_UPDATE = Goal(floors=1.5)
CASES = (
    _case("correct", 1280, 128, "bf16", _on_h200(1.6, 1.20)),
    _case("correct", 1280, 128, "bf16", _on_h200(2.2, 1.39), complement="diagonal"),
    _case("correct", 1280, 128, "tf32", _on_h200(3.2, 2.41)),
    _case("correct", 768, 128, "bf16", _on_h200(1.0, 0.72)),
    _case("correct", 512, 128, "bf16", _on_h200(0.7, 0.48)),
    _case("correct", 1280, 256, "bf16", _on_h200(2.6, 1.85)),
    _case("correct_sums", 1280, 128, "bf16", _on_h200(1.0, 0.60)),
    _case("encode", 1280, 128, "bf16", _UPDATE),
    _case("decode", 1280, 128, "bf16", _UPDATE),
    _case("encode_decode", 1280, 128, "bf16", _UPDATE),
    _case("correct", 1280, 128, "bf16", _BACKWARD, backward=True),
    _case("encode", 1280, 128, "bf16", _BACKWARD, backward=True),
    _case("decode", 1280, 128, "bf16", _BACKWARD, backward=True),
)
LATENCY_CASE = CASES[0]


def select(patterns: Sequence[str]) -> tuple[BenchCase, ...]:
    """Cases whose name is given or matches a pattern with ``*``, in the order of the suite; all for no pattern.

    Raises:
        InputError: a name or pattern that no case has.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in CASES):
            raise InputError(f"there is no case {pattern!r}; choose of {', '.join(case.name for case in CASES)}")
    wanted = [case for case in CASES if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    return tuple(wanted) if patterns else CASES

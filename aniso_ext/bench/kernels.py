"""Run cases: draw, check, time in turn, and set against the floor."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aniso_ext.bench.ceilings import Ceilings, matmul_precision
from aniso_ext.bench.checks import Check, Checker
from aniso_ext.bench.floors import work_of
from aniso_ext.bench.records import FAILED, MEASURED, Measurement
from aniso_ext.bench.suite import BenchCase
from aniso_ext.bench.timing import Times, cache_bytes, interleaved
from aniso_ext.bench.variants import COMPILED, EAGER, Batch, Variant, draw, runner, variants
from aniso_ext.errors import BackendUnavailableError, InputError

_CACHES_TO_EXCEED = 4
_MOST_BATCHES = 16
DEFAULT_ROWS = {"cuda": 2**20, "cpu": 2048}
DEFAULT_ROUNDS = {"cuda": 25, "cpu": 5}


@dataclass(frozen=True)
class Options:
    """How to run a case."""

    rows: int
    rounds: int
    backends: tuple[str, ...]
    device: torch.device
    compile: bool


def usable_backends(wanted: Sequence[str], device: torch.device) -> tuple[str, ...]:
    """The backends to time: those that are asked for, or every one with kernels for the device.

    Raises:
        InputError: an unknown name.
        BackendUnavailableError: a backend that is asked for cannot run here, or none can.
    """
    from aniso_ext.ops import backends

    reasons = backends.available()
    for name in wanted:
        if name not in reasons:
            raise InputError(f"unknown backend {name!r}: choose of {', '.join(reasons)}")
        if reasons[name] is not None:
            raise BackendUnavailableError(f"backend {name!r} is not available: {reasons[name]}")
    if wanted:
        return tuple(dict.fromkeys(wanted))
    candidates = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    found = tuple(name for name in candidates if reasons[name] is None)
    if not found:
        why = "; ".join(f"{name}: {reasons[name]}" for name in candidates)
        raise BackendUnavailableError(f"no kernels to time on {device.type}: {why}. --backend reference times without")
    return found


def run_case(case: BenchCase, options: Options, ceilings: Ceilings) -> list[Measurement]:
    """All variants of a case; those that fail their check or cannot run carry the reason and no time."""
    if options.compile:
        torch._dynamo.reset()
    with matmul_precision(case.precision):
        batches = _batches(case, options)
        checker = Checker(case, batches[0])
        rows: dict[str, Measurement] = {}
        runs: dict[str, Callable[[int], object]] = {}
        steps: Check | None = None
        for variant in variants(case, options.backends, options.device, options.compile):
            rows[variant.name] = _row(case, variant, options.rows)
            try:
                found = [runner(case, variant.function, batch) for batch in batches]
                check = checker.check(found[0](), variant.problem, variant.ours, steps)
            except Exception as error:  # whatever a variant raises is its result, and the others still count
                check = Check(math.nan, math.nan, _first_line(error))
            if variant.name == EAGER:
                steps = check if check.reason is None else None
            if check.reason is None:
                rows[variant.name].error = check.error
                runs[variant.name] = functools.partial(_rotate, found)
            else:
                rows[variant.name].status, rows[variant.name].reason = FAILED, check.reason
        times = interleaved(runs, options.device, options.rounds) if runs else {}
    for name, measured in times.items():
        _fill(rows[name], case, measured, times, ceilings)
        if rows[name].ours and options.device.type == "cuda":
            _judge(rows[name], case)
    del batches, checker, runs
    gc.collect()
    if options.device.type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def as_ceilings(ceilings: Ceilings) -> dict[str, float]:
    """By the names of the files: `copy GB/s`, `bf16 TFLOP/s`."""
    products = {f"{format} TFLOP/s": value for format, value in ceilings.gemm_tflop_per_s.items()}
    return {"copy GB/s": ceilings.copy_gb_per_s, **products}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _rotate(found: Sequence[Callable[[], object]], sample: int) -> object:
    return found[sample % len(found)]()


def _batches(case: BenchCase, options: Options) -> list[Batch]:
    """So many sets of inputs that a cache forgets each before it comes again."""
    first = draw(case, options.rows, options.device, seed=0)
    wanted = math.ceil(_CACHES_TO_EXCEED * cache_bytes(options.device) / max(1, first.bytes))
    count = min(max(1, wanted), _MOST_BATCHES)
    return [first, *(draw(case, options.rows, options.device, seed=10 * index) for index in range(1, count))]


def _row(case: BenchCase, variant: Variant, rows: int) -> Measurement:
    problem, work = variant.problem, work_of(case)
    return Measurement(
        case=case.name,
        operation=case.operation + (" backward" if case.backward else ""),
        format=case.format,
        D=problem.width,
        R=problem.rank,
        K=problem.knots,
        complement=problem.complement,
        rows=rows,
        variant=variant.name,
        ours=variant.ours,
        status=MEASURED,
        bytes_per_row=work.bytes,
        flop_per_row=work.flop,
    )


def _fill(row: Measurement, case: BenchCase, times: Times, all_times: dict[str, Times], ceilings: Ceilings) -> None:
    """Everything that follows from the times; bytes and operations are those of the case, whatever a variant moves."""
    scale = 1e9 / row.rows
    work = work_of(case)
    floor = work.floor_ns(ceilings, case.format)
    nanoseconds = times.median * scale
    row.ns_per_row, row.p20, row.p80 = nanoseconds, times.p20 * scale, times.p80 * scale
    row.gb_per_s, row.tflop_per_s = work.bytes / nanoseconds, work.flop / nanoseconds / 1e3
    row.floor_ns, row.over_floor = floor, nanoseconds / floor
    eager, compiled = (all_times.get(name) for name in (EAGER, COMPILED))
    row.speedup_eager = None if eager is None else eager.median / times.median
    row.speedup_compiled = None if compiled is None else compiled.median / times.median


def _judge(row: Measurement, case: BenchCase) -> None:
    """The goals are those of the GPU kernels."""
    assert row.ns_per_row is not None and row.floor_ns is not None
    compiled = None if row.speedup_compiled is None else row.speedup_compiled * row.ns_per_row
    row.goal_ns = case.goal.limit(row.floor_ns)
    row.met = case.goal.met(row.ns_per_row, row.floor_ns, compiled)

"""Small batches: what a call costs until its result is there, with and without CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from aniso_ext.bench.records import Latency
from aniso_ext.bench.suite import LATENCY_CASE
from aniso_ext.bench.timing import latency, synchronize
from aniso_ext.bench.variants import Function, Variant, draw, ours, variants

EAGER, COMPILED, GRAPH = "eager", "compiled", ", graph"
_ROWS = {"cuda": (1, 64, 1024, 16_384), "cpu": (1, 64, 1024)}
_REPEATS = {"cuda": 200, "cpu": 10}


def run(device: torch.device, backend: str, compile: bool) -> list[Latency]:
    """The default backend, or the one named, against stock PyTorch; inputs stay where they are."""
    case = LATENCY_CASE
    steps, *compiled = variants(case, (), device, compile)
    if compile:
        torch._dynamo.reset()
    default = ours(case.operation, case.problem, backend)
    found = []
    for rows in _ROWS[device.type]:
        inputs = draw(case, rows, device, seed=0).inputs
        for name, way in _ways(backend, default, steps.function, compiled, inputs).items():
            try:
                times = latency(way(), device, _REPEATS[device.type])
            except Exception as error:
                # the others still count; `aniso bench kernels` has checked all of them before
                warnings.warn(f"no latency of {name} for {rows} rows: {error}", stacklevel=2)
                continue
            found.append(Latency(case.name, rows, name, times.median * 1e6, times.p20 * 1e6, times.p80 * 1e6))
    return found


def _ways(
    backend: str, default: Function, steps: Function, compiled: Sequence[Variant], inputs: tuple[torch.Tensor, ...]
) -> dict[str, Callable[[], Callable[[], object]]]:
    """How to make each call; made when its turn comes, as making one captures a graph."""
    found: dict[str, Callable[[], Callable[[], object]]] = {
        backend: lambda: _call(default, inputs),
        EAGER: lambda: _call(steps, inputs),
    }
    if inputs[0].is_cuda:
        found[backend + GRAPH] = lambda: captured(default, inputs)
        found[EAGER + GRAPH] = lambda: captured(steps, inputs)
    if compiled:
        found[COMPILED] = lambda: _call(compiled[0].function, inputs)
    return found


def captured(function: Function, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """A replay of the function as a CUDA graph over these very inputs."""
    call = _call(function, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    synchronize(inputs[0].device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _call(function: Function, inputs: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call

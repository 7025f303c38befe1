"""Small batches: what a call costs until its result is there, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aniso_ext.bench.records import Latency
from aniso_ext.bench.suite import LATENCY_CASE, LATENCY_ROWS
from aniso_ext.bench.timing import latency, synchronize
from aniso_ext.bench.variants import Function, draw, ours, variants

OURS, OURS_GRAPH, EAGER, EAGER_GRAPH, COMPILED = "auto", "auto, graph", "eager", "eager, graph", "compiled"
_REPEATS = {"cuda": 200, "cpu": 10}


def run(device: torch.device, backend: str, compile: bool) -> list[Latency]:
    """The default backend, or the one named, against stock PyTorch; inputs stay where they are."""
    case = LATENCY_CASE
    steps, *compiled = variants(case, (), device, compile)
    if compile:
        torch._dynamo.reset()
    found = []
    for rows in LATENCY_ROWS:
        inputs = draw(case, rows, device, seed=0).inputs
        calls: dict[str, Callable[[], object]] = {
            OURS: _call(ours(case.operation, case.problem, backend), inputs),
            EAGER: _call(steps.function, inputs),
        }
        if device.type == "cuda":
            calls[OURS_GRAPH] = captured(ours(case.operation, case.problem, backend), inputs)
            calls[EAGER_GRAPH] = captured(steps.function, inputs)
        if compile:
            calls[COMPILED] = _call(compiled[0].function, inputs)
        for name, call in calls.items():
            times = latency(call, device, _REPEATS[device.type])
            found.append(Latency(case.name, rows, name, times.median * 1e6, times.p20 * 1e6, times.p80 * 1e6))
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

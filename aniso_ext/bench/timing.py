"""Clocks of a device: samples of several functions in turn, medians and fifths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Run = Callable[[int], object]  # of the index of a sample: functions rotate among input sets by it

# What every sample waits on before its clock starts, about half a millisecond: long enough for Python to have queued
# the work, so that kernels are timed and not their launches.
_HEAD_START_CYCLES = 1_000_000


@dataclass(frozen=True)
class Times:
    """Seconds: median and the fifths around it."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = quantiles(samples, n=5, method="inclusive")
        return cls(median(samples), fifths[0], fifths[3])


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory; of a CPU a guess that is large enough."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))
    return 32 * 2**20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs: Mapping[str, Run], device: torch.device, rounds: int, warm_up: int = 2) -> dict[str, Times]:
    """Every function once a round, in an order that turns from round to round, so that drift meets all alike."""
    names = list(runs)
    for sample in range(warm_up):
        for name in names:
            runs[name](sample)
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name, seconds in _one_round(runs, turned, device, number).items():
            samples[name].append(seconds)
    return {name: Times.of(values) for name, values in samples.items()}


def _one_round(runs: Mapping[str, Run], names: list[str], device: torch.device, number: int) -> dict[str, float]:
    if device.type != "cuda":
        found = {}
        for name in names:
            started = time.perf_counter()
            runs[name](number)
            found[name] = time.perf_counter() - started
        return found
    events = {}
    for name in names:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start.record()
        runs[name](number)
        end.record()
        # one at a time: the head start is that of this sample, and memory is what one function needs
        torch.cuda.synchronize(device)
        events[name] = (start, end)
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


def latency(run: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 10) -> Times:
    """Seconds from the call until the result is there, one call at a time."""
    for _ in range(warm_up):
        run()
    synchronize(device)
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        synchronize(device)
        samples.append(time.perf_counter() - started)
    return Times.of(samples)

"""Where the time of a function goes on the device, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from aniso_ext.bench.timing import synchronize


def kernels_of(step: Callable[[], None], title: str, device: torch.device, steps: int = 10, most: int = 30) -> str:
    """Device time of a step by kernel, longest first, as a table."""
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        for _ in range(steps):
            step()
        synchronize(device)
    spent = [
        (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total, event.count, event.key)
        for event in seen.key_averages()
    ]
    spent = [item for item in spent if item[0] > 0]  # calls of the host have no time on the device
    total = sum(time for time, _, _ in spent)
    count = sum(number for _, number, _ in spent)
    lines = [f"{title}: {total / steps:.0f} us in {count / steps:.0f} kernels a step"]
    for time, number, name in sorted(spent, reverse=True)[:most]:
        lines.append(f"{time / steps:9.1f} us {time / total:6.1%} {number / steps:6.1f} x  {name[:110]}")
    return "\n".join(lines)

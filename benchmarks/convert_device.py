"""Rate of the device part of a conversion, host buffers to host buffers, against copies over the bus in the same run.

    python benchmarks/convert_device.py                    # CUDA, 512 x float16, the closed form
    python benchmarks/convert_device.py --width 1280 --rows 8_000_000

map     rows that lie in pinned buffers are copied in, checked, mapped and copied out, as `aniso convert` does it; the
        host takes every result in order. Rows are counted from the first copy to the last result.
copies  the same bytes both ways at once, from and to pinned memory, with nothing between: the most the bus allows.
Both are repeated in turn; medians, and their ratio. Each way counts its own bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque

import numpy as np
import torch

from aniso_ext.align import AnisoAlign
from aniso_ext.bench.environment import facts
from aniso_ext.convert.device import CudaMapper, CudaRuntime, Extent, Pending
from aniso_ext.convert.maps import as_array, make_map


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def unit_rows(rows: int, width: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32) + 0.3
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def map_seconds(mapper: CudaMapper, buffers: list[np.ndarray], batches: int) -> float:
    """Every batch through the mapper; the buffers go round without being filled again."""
    in_flight: deque[Pending] = deque()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with mapper:
        for number in range(batches):
            if len(in_flight) == mapper.depth:
                in_flight.popleft().result()
            in_flight.append(mapper.submit(buffers[number % len(buffers)]))
        while in_flight:
            in_flight.popleft().result()
    return time.perf_counter() - started


def copy_seconds(device: torch.device, size: int, batches: int) -> float:
    """Copies of ``size`` bytes in and out at once, ``batches`` of each."""
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_device = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    upload, download = torch.cuda.Stream(device), torch.cuda.Stream(device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(batches):
        with torch.cuda.stream(upload):
            on_device[0].copy_(pinned[0], non_blocking=True)
        with torch.cuda.stream(download):
            pinned[1].copy_(on_device[1], non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    fitted = [unit_rows(20_000, options.width, seed) for seed in range(2)]
    aligner = AnisoAlign(rank=options.rank, refine=False).fit(fitted[0], -fitted[1])
    row_map = make_map(aligner, options.dtype, options.dtype, options.device)
    extent = Extent(options.width, options.dtype, options.dtype, 8192)
    mapper = CudaMapper(row_map, extent, CudaRuntime(options.device))
    buffers = [mapper.buffer() for _ in range(mapper.depth + 1)]
    rows = torch.from_numpy(unit_rows(mapper.batch_rows, options.width, 2)).to(getattr(torch, options.dtype))
    for buffer in buffers:
        buffer[:] = as_array(rows)
    batches = max(1, options.rows // mapper.batch_rows)
    size = buffers[0].nbytes
    map_seconds(mapper, buffers, min(batches, 8))
    copy_seconds(device, size, min(batches, 8))
    times = [
        (map_seconds(mapper, buffers, batches), copy_seconds(device, size, batches)) for _ in range(options.rounds)
    ]
    mapped, copied = (statistics.median(column) for column in zip(*times, strict=True))
    for name, value in facts(device).items():
        print(f"{name}: {value}")
    print(f"{batches} batches of {mapper.batch_rows} x {options.width} {options.dtype}, {size / 1e6:.1f} MB each way")
    for name, seconds in (("map", mapped), ("copies", copied)):
        rate, bandwidth = batches * mapper.batch_rows / seconds / 1e6, batches * size / seconds / 1e9
        print(f"{name:8s}{rate:8.2f} M rows/s {bandwidth:8.2f} GB/s each way")
    print(f"map / copies: {copied / mapped:.1%}")


if __name__ == "__main__":
    main()

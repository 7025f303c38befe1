"""What `aniso bench convert` times, each in a process of its own: python -m aniso_ext.bench.convert_jobs KIND JOB

KIND is a key of JOBS, JOB a :class:`Job` as JSON. It prints one JSON object: rows, seconds, and the peak of the
resident set in MB. The start of the process, imports and loading an aligner are not timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from aniso_ext.align import Aligner
    from aniso_ext.convert.device import CudaMapper, HostMapper, Pending

IN_MEMORY_ROWS = 2**18
"""Rows of the arrays of the jobs that work in memory."""
BUS_ROWS = 2**25
"""Rows that cross the bus each way where nothing else is timed."""


@dataclass(frozen=True)
class Job:
    """Where a job finds what it needs: shards, records, a target, an aligner, and an empty folder for its output."""

    input: str
    records: str
    target: str
    aligner: str
    output: str
    device: str

    @property
    def shards(self) -> list[Path]:
        return sorted(Path(self.input).iterdir())


def copy(job: Job) -> tuple[int, Callable[[], object]]:
    """`cp` of the shards, then every file and the folder brought to disk, as a conversion does."""

    def run() -> None:
        for path in job.shards:
            target = Path(job.output, path.name)
            subprocess.run(["cp", "--reflink=never", path, target], check=True)
            _sync(target)
        _sync(Path(job.output))

    return _rows(job), run


def op(job: Job) -> tuple[int, Callable[[], object]]:
    """The aligner on an array in memory, again and again until about as many rows as the files hold went through it."""
    aligner, rows = _aligner(job), _in_memory(job)
    aligner.transform(rows[:8192])
    times = max(1, _rows(job) // len(rows))

    def run() -> None:
        for _ in range(times):
            aligner.transform(rows)

    return times * len(rows), run


def convert(job: Job) -> tuple[int, Callable[[], object]]:
    """Files to files."""
    from aniso_ext.convert import convert_embeddings

    aligner = _warmed_up(_aligner(job), job.device)
    return _rows(job), lambda: convert_embeddings(aligner, job.input, job.output, device=job.device)


def fit_and_convert(job: Job) -> tuple[int, Callable[[], object]]:
    """Files to files with a fit on them before it: what the four passes over records do."""
    from aniso_ext.convert import convert_embeddings

    aligner = _warmed_up(_aligner(job), job.device)

    def run() -> None:
        convert_embeddings(aligner.fit(job.input, job.target), job.input, job.output, device=job.device)

    return _rows(job), run


def pickled(job: Job) -> tuple[int, Callable[[], object]]:
    """Pickled records to pickled records."""
    from aniso_ext.bench.pickled_realign import realign_records

    target = np.load(job.target, allow_pickle=False).astype(np.float64)
    mean, trace = target.mean(axis=0), float(target.var(axis=0).sum())
    paths = sorted(Path(job.records).iterdir())
    rows = int(paths[-1].stem.partition("-")[2])
    return rows, lambda: realign_records(paths, Path(job.output), mean, trace)


def memory(job: Job) -> tuple[int, Callable[[], object]]:
    """An array to pinned buffers: a conversion without its files, in which one thread copies the rows on the host."""
    from aniso_ext.convert.crew import Crew
    from aniso_ext.convert.overlap import mapped_batches
    from aniso_ext.data import open_embeddings

    rows = _in_memory(job)
    shard = open_embeddings(rows).shards[0]
    mapper = _mapper(job, rows).for_rows(shard.rows)
    reader = Crew(1, "aniso-read")

    def run() -> None:
        with mapper:
            for batch in mapped_batches(shard, mapper, reader):
                batch.result()

    run()
    return len(rows), run


def buffers(job: Job) -> tuple[int, Callable[[], object]]:
    """Pinned buffers to pinned buffers: the device's part of a conversion. The host takes every result in order."""
    rows = _in_memory(job)
    mapper = _mapper(job, rows)
    sources = [mapper.buffer() for _ in range(mapper.depth + 1)]
    for source in sources:
        source[:] = np.resize(rows, source.shape)
    batches = max(1, BUS_ROWS // mapper.batch_rows)

    def run() -> None:
        in_flight: deque[Pending] = deque()
        with mapper:
            for number in range(batches):
                if len(in_flight) == mapper.depth:
                    in_flight.popleft().result()
                in_flight.append(mapper.submit(sources[number % len(sources)]))
            while in_flight:
                in_flight.popleft().result()

    run()
    return batches * mapper.batch_rows, run


def bus(job: Job) -> tuple[int, Callable[[], object]]:
    """Rows to the device and as many back at the same time, from and to pinned memory."""
    import torch

    rows = torch.from_numpy(_in_memory(job))
    device = torch.device(job.device)
    sent, back = rows.pin_memory(), torch.empty_like(rows).pin_memory()
    there, leaving = (torch.empty_like(rows, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    copies = max(1, BUS_ROWS // len(rows))

    def run() -> None:
        for _ in range(copies):
            with torch.cuda.stream(streams[0]):
                there.copy_(sent, non_blocking=True)
            with torch.cuda.stream(streams[1]):
                back.copy_(leaving, non_blocking=True)
        torch.cuda.synchronize(device)

    run()
    return copies * len(rows), run


JOBS = {job.__name__: job for job in (copy, op, convert, fit_and_convert, pickled, memory, buffers, bus)}


def _aligner(job: Job) -> Aligner:
    from aniso_ext.align import load_aligner

    aligner = load_aligner(job.aligner)
    if "device" in aligner.parameter_names():
        aligner.set_params(device=job.device)
    return aligner


def _mapper(job: Job, rows: np.ndarray) -> HostMapper | CudaMapper:
    """What `aniso convert` maps these rows with, batches of the size it takes for a long shard."""
    from aniso_ext.convert.device import Extent, make_mapper
    from aniso_ext.convert.maps import make_map
    from aniso_ext.data.dtypes import stored_name

    dtype = stored_name(rows.dtype)
    row_map = make_map(_aligner(job), dtype, dtype, job.device)
    return make_mapper(row_map, Extent(rows.shape[1], dtype, dtype, 8192), job.device, None)


def _warmed_up(aligner: Aligner, device: str) -> Aligner:
    """The same aligner, after a conversion of a few rows: that imports what is imported late."""
    from aniso_ext.convert import convert_embeddings

    with tempfile.TemporaryDirectory() as folder:
        convert_embeddings(aligner, np.ones((64, aligner.width), np.float16), Path(folder, "few.npy"), device=device)
    return aligner


def _rows(job: Job) -> int:
    from aniso_ext.data import open_embeddings

    return open_embeddings(job.input).rows


def _in_memory(job: Job) -> np.ndarray:
    from aniso_ext.data import open_embeddings

    return open_embeddings(job.input).read(slice(0, IN_MEMORY_ROWS))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def peak_mb() -> float:
    """Peak of the resident set of this process; that of its parent, which getrusage starts from, is no part of it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    kind, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    rows, run = JOBS[kind](job)
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    print(json.dumps({"rows": rows, "seconds": seconds, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()

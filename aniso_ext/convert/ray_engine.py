"""A conversion by the workers of a Ray cluster.

A task is one worker of the conversion, with a share of the shards: it takes the same locks, writes the same records and
merges into the same manifest as a process that was started by hand, so that the bytes are the same. A task gets paths
and plain options, never rows or an aligner, hence the folders must be visible to every node. Ray starts the task of a
process that died again, and it resumes.
"""

from __future__ import annotations

import functools
import operator
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aniso_ext.convert.conversion import Machine, check_choice, prepare
from aniso_ext.convert.manifest import Manifest
from aniso_ext.convert.pipeline import ON_EXISTING, Progress, convert_embeddings
from aniso_ext.convert.report import ConversionReport
from aniso_ext.convert.workers import shares
from aniso_ext.ray_cluster import Cluster

if TYPE_CHECKING:
    from aniso_ext.align import Aligner

TASKS_PER_PLACE = 4
"""Tasks for each place where one can run: enough that the slowest is a small part of the whole."""
_DEFAULTS = {
    "batch_rows": None,
    "calibration": "fitted",
    "on_bad": "fail",
    "dtype": None,
    "format": None,
    "kind": None,
    "column": None,
}
_MACHINE = ("memory", "device", "threads")


def convert_on_ray(
    aligner: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    on_existing: str = "resume",
    cpus: int = 1,
    stop: Callable[[], bool] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ConversionReport:
    """:func:`aniso_ext.convert.convert_embeddings` by tasks of Ray; the output is the same, to the byte.

    The cluster is that of ``RAY_ADDRESS``; without it one is started on this machine and stopped at the end.

    Args:
        aligner: folder of a saved aligner.
        input, output: paths, as for ``convert_embeddings``; every node must see them at the same place.
        on_existing: as there; done before the first task.
        cpus: cores of a task; with a CUDA ``device`` it takes a GPU as well.
        stop: asked twice a second; once it says True, tasks are cancelled and the run ends with :class:`StoppedError`.
        progress: called with (rows of finished tasks, rows in all); a corpus calibration counts its passes too.
        options: what else ``convert_embeddings`` may be told about rows, files and the machine.

    Raises:
        BackendUnavailableError: Ray is not installed, cannot start or be reached, or has no place for a task.
        WorkerError: the process of a task died again and again.
        InputError, DataError, ArtefactError, StoppedError: as ``convert_embeddings``.
    """
    started = time.perf_counter()
    check_choice("on_existing", on_existing, ON_EXISTING)
    places = (_absolute(input), _absolute(output))
    model = _load(_absolute(aligner))
    machine = Machine(*(options.get(name) for name in _MACHINE))
    kept = {name: value for name, value in options.items() if name not in _MACHINE}
    conversion = prepare(model, *places, machine=machine, **{**_DEFAULTS, **kept})
    with Manifest(conversion.plan, conversion.header(), on_existing) as manifest:
        finished = manifest.finished()
    rows = conversion.shard_rows()
    if len(finished) < len(rows):
        passes = 1 + (model.corpus_passes if conversion.calibration == "corpus" else 0)
        gpus = int(machine.device is not None and machine.device.startswith("cuda"))
        with Cluster(cpus, gpus) as cluster:
            world = min(len(rows), TASKS_PER_PLACE * cluster.places())
            job = _Job(_absolute(aligner), *places, options, world, model.fingerprint())
            loads = [sum(rows[index] for index in share) for share in shares(rows, world)]
            _run_tasks(cluster, job, loads, passes, stop or _never, progress)
    # Nothing is left to do: this reads what the tasks have recorded.
    report = convert_embeddings(model, *places, **options)
    return replace(report, resumed_shards=len(finished), seconds=time.perf_counter() - started)


def _absolute(path: str | os.PathLike[str]) -> str:
    """The same place for a process with another working folder; URLs stay as they are."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def _never() -> bool:
    return False


@functools.lru_cache(maxsize=1)
def _load(aligner: str) -> Aligner:
    """The aligner, kept by the process from task to task."""
    from aniso_ext.align import load_aligner

    return load_aligner(aligner)


@dataclass(frozen=True)
class _Job:
    """What a task is told beside its rank."""

    aligner: str
    input: str
    output: str
    options: dict[str, Any]
    world: int
    fingerprint: str


def _convert_share(job: _Job, rank: int) -> int:
    """What one task does; how many shards the corpus calibration still waits for."""
    if _load(job.aligner).fingerprint() != job.fingerprint:
        _load.cache_clear()
    model = _load(job.aligner)
    report = convert_embeddings(model, job.input, job.output, worker=(rank, job.world), **job.options)
    return report.missing_sums


def _run_tasks(
    cluster: Cluster,
    job: _Job,
    loads: list[int],
    passes: int,
    stop: Callable[[], bool],
    progress: Progress | None,
) -> None:
    """Rounds of tasks: with a corpus calibration a round ends where sums of others are needed, one pass further."""
    left = list(range(job.world))
    reached = [0] * job.world
    for number in range(passes):
        tasks = {cluster.submit(_convert_share, job, rank): rank for rank in left}
        left = []
        for task, missing in cluster.results(list(tasks), stop):
            rank = tasks[task]
            reached[rank] = number + 1 if missing else passes
            if missing:
                left.append(rank)
            if progress is not None:
                progress(sum(map(operator.mul, loads, reached)), passes * sum(loads))
        left.sort()

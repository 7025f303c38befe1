"""A fit by tasks of a Ray cluster: the processes of ``torchrun``, started by Ray.

The tasks run at the same time and form a group of torch.distributed, in which the fit is what it is under torchrun:
each streams its share of the rows, and what they have counted is merged in order of rank. The aligner is therefore a
function of the number of tasks, to the bit that of as many processes, and that of one process to rounding.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aniso_ext.align.artefact import CONFIG, MODEL, load_aligner
from aniso_ext.align.base import Aligner
from aniso_ext.align.registry import make_aligner
from aniso_ext.align.rows import open_rows
from aniso_ext.errors import BackendUnavailableError, InputError
from aniso_ext.ray_cluster import Cluster

Place = str | os.PathLike[str]


def fit_on_ray(
    aligner: Aligner,
    source: Place,
    target: Place,
    *,
    tasks: int | None = None,
    cpus: int = 1,
    stop: Callable[[], bool] | None = None,
    **run: Any,
) -> Aligner:
    """``aligner.fit(source, target, **run)`` by tasks of Ray; the fitted aligner comes back.

    The cluster is that of ``RAY_ADDRESS``; without it one is started on this machine and stopped at the end.

    Args:
        aligner: tells method and options; with a CUDA ``device`` each task takes a GPU.
        source, target: paths; every node must see them at the same place.
        tasks: how many share the rows; None for as many as can run at the same time, at most one a row.
        cpus: cores of a task.
        stop: asked twice a second; once it says True, the tasks are ended and the fit with :class:`StoppedError`.
        run: what else ``fit`` of this method takes, such as ``checkpoint_dir``; folders that every node sees.

    Raises:
        BackendUnavailableError: Ray is not installed, cannot start or be reached, or has no place for so many tasks.
        WorkerError: the process of a task died.
        InputError, DataError, StoppedError: as ``fit``.
    """
    places = _absolute(source), _absolute(target)
    rows = min(open_rows(place, name).count for place, name in zip(places, ("source", "target"), strict=True))
    options = aligner.get_params()
    on_gpu = str(options.get("device") or "cpu").startswith("cuda")
    if on_gpu:
        options["device"] = "cuda"  # Ray shows a task its own GPU alone
    if tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1):
        raise InputError(f"tasks must be an integer of at least 1, got {tasks!r}")
    run = {name: _absolute(value) if isinstance(value, (str, os.PathLike)) else value for name, value in run.items()}
    with Cluster(cpus, int(on_gpu), retries=0, needed_by_others=True) as cluster:
        there = cluster.places()
        world = max(1, min(there, rows)) if tasks is None else tasks
        if world > there:
            raise BackendUnavailableError(
                f"{world} tasks must run at the same time, and Ray has room for {there}: ask for less, or add nodes"
            )
        store, address = _meeting_place(world)
        job = _Job(aligner.method, options, places, run, world, address, "nccl" if on_gpu else "gloo", 0)
        waiting = [cluster.submit(_fit_share, replace(job, rank=rank)) for rank in range(world)]
        found = {task: result for task, result in cluster.results(waiting, stop or _never)}
        del store  # the tasks met there
    kept = {name: value for name, value in aligner.get_params().items() if name in aligner.runtime_options}
    return _loaded(found[waiting[0]]).set_params(**kept)


@dataclass(frozen=True)
class _Job:
    """What a task is told."""

    method: str
    options: dict[str, Any]
    places: tuple[str, str]
    run: dict[str, Any]
    world: int
    address: tuple[str, int]
    backend: str
    rank: int


def _fit_share(job: _Job) -> dict[str, bytes]:
    """What one task does; the first one returns the files of the aligner, as any other would."""
    import torch.distributed as dist

    store = dist.TCPStore(*job.address, job.world, is_master=False)
    dist.init_process_group(job.backend, store=store, rank=job.rank, world_size=job.world)
    try:
        aligner = make_aligner(job.method, **job.options).fit(*job.places, **job.run)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if job.rank:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        aligner.save_pretrained(folder)
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG, MODEL)}


def _loaded(files: dict[str, bytes]) -> Aligner:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_aligner(folder)


def _meeting_place(world: int) -> tuple[Any, tuple[str, int]]:
    """A store on this machine at which the tasks find each other, and its address."""
    import ray.util
    import torch.distributed as dist

    host = ray.util.get_node_ip_address()
    store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
    return store, (host, store.port)


def _absolute(path: Place) -> str:
    """The same place for a process with another working folder; URLs stay as they are."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def _never() -> bool:
    return False

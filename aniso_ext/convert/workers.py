"""Which worker of a conversion this process is, and which shards are its own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aniso_ext.errors import InputError

_TORCHRUN = ("RANK", "WORLD_SIZE")
_SLURM_STEP = ("SLURM_PROCID", "SLURM_NTASKS")
_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID")
_SLURM_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
MOST_WORKERS = 1 << 24


@dataclass(frozen=True)
class Worker:
    """One of ``world`` processes that share a conversion.

    Attributes:
        rank: from 0 to world - 1.
        world: number of workers; 1 is a process that is alone.
        origin: what said so, for the log.
        together: whether all workers start at the same time, so that they may wait for one another.
    """

    rank: int = 0
    world: int = 1
    origin: str = ""
    together: bool = False

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("world", self.world)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"the {name} of a worker must be an integer, got {value!r}")
        if not 1 <= self.world <= MOST_WORKERS or not 0 <= self.rank < self.world:
            raise InputError(f"worker {self.rank} of {self.world} is impossible: ranks go from 0 to the number minus 1")

    @classmethod
    def of(cls, worker: Worker | tuple[int, int] | None) -> Worker:
        """A worker as callers may name it: itself, (rank, world), or None for a process that is alone."""
        return worker if isinstance(worker, Worker) else cls(*(worker or (0, 1)))

    def __str__(self) -> str:
        return f"worker {self.rank} of {self.world}"

    def share(self, rows: Sequence[int]) -> list[int]:
        """Ascending indices of the shards of this worker, given the rows of all shards.

        From the largest shard to the smallest, each goes to the worker that has the fewest rows so far; ties go to the
        earlier shard and the lower rank. Every worker works this out by itself, with the same result.
        """
        return shares(rows, self.world)[self.rank]


def shares(rows: Sequence[int], world: int) -> list[list[int]]:
    """The shards of every worker; see :meth:`Worker.share`.

    Example:
        >>> shares([5, 9, 4, 2], 2)
        [[1, 3], [0, 2]]
    """
    from heapq import heapify, heapreplace

    loads = [(0, rank) for rank in range(world)]
    heapify(loads)
    assigned: list[list[int]] = [[] for _ in range(world)]
    for index in sorted(range(len(rows)), key=lambda index: -rows[index]):
        load, rank = loads[0]
        assigned[rank].append(index)
        heapreplace(loads, (load + rows[index], rank))
    return [sorted(indices) for indices in assigned]


def parse_worker(text: str) -> Worker:
    """The worker that ``N/M`` names: N from 0 to M - 1.

    Example:
        >>> str(parse_worker("3/16"))
        'worker 3 of 16'
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if match is None:
        raise InputError(f"{text!r} names no worker: pass N/M, for example 0/16 to 15/16 for sixteen workers")
    return Worker(int(match[1]), int(match[2]), "as told")


def worker_from_environment(environment: Mapping[str, str] | None = None) -> Worker:
    """The worker that torchrun or Slurm made of this process; alone where neither did.

    ``RANK`` of ``WORLD_SIZE`` (torchrun and its like) comes first. Otherwise a job array and the tasks of a step
    multiply: task p of n in the a-th of c array jobs is worker a n + p of c n, from ``SLURM_ARRAY_TASK_ID`` and
    ``SLURM_ARRAY_TASK_COUNT``, ``SLURM_PROCID`` and ``SLURM_NTASKS``.

    Raises:
        InputError: a variable is not a number, or the indices of the job array have gaps.
    """
    found = os.environ if environment is None else environment
    if all(found.get(name) for name in _TORCHRUN):
        rank, world = (_number(found, name) for name in _TORCHRUN)
        return Worker(rank, world, "RANK of WORLD_SIZE", together=True)
    rank, world, origins = 0, 1, []
    if all(found.get(name) for name in _SLURM_ARRAY):
        rank, world = _array_index(found), _number(found, "SLURM_ARRAY_TASK_COUNT")
        origins.append("SLURM_ARRAY_TASK_ID of SLURM_ARRAY_TASK_COUNT")
    together = world == 1
    if all(found.get(name) for name in _SLURM_STEP):
        task, tasks = (_number(found, name) for name in _SLURM_STEP)
        rank, world = rank * tasks + task, world * tasks
        if tasks > 1:
            origins.append("SLURM_PROCID of SLURM_NTASKS")
    return Worker(rank, world, " and ".join(origins), together=together and world > 1)


def local_device(device: str | None, environment: Mapping[str, str] | None = None) -> str | None:
    """``cuda`` as the GPU of this process among those of its machine; any other device as it is.

    The process is number ``LOCAL_RANK`` (torchrun) or ``SLURM_LOCALID`` of its machine. Where there are more processes
    than GPUs they take turns.

    Raises:
        InputError: the variable is not a number.
    """
    if device != "cuda":
        return device
    found = os.environ if environment is None else environment
    name = next((name for name in _LOCAL if found.get(name)), None)
    if name is None:
        return device
    from torch.cuda import device_count

    count = device_count()
    return f"cuda:{_number(found, name) % count}" if count else device


def _number(found: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", found[name]):
        raise InputError(f"{name} is {found[name]!r}, not a number: unset it, or name the worker")
    return int(found[name])


def _array_index(found: Mapping[str, str]) -> int:
    """Position of this job among those of its array, whose indices may start anywhere and have a step."""
    given, count = (_number(found, name) for name in _SLURM_ARRAY)
    first = _number(found, "SLURM_ARRAY_TASK_MIN") if found.get("SLURM_ARRAY_TASK_MIN") else 0
    step = _number(found, "SLURM_ARRAY_TASK_STEP") if found.get("SLURM_ARRAY_TASK_STEP") else 1
    index, rest = divmod(given - first, max(1, step))
    if rest or not 0 <= index < count:
        raise InputError(
            f"SLURM_ARRAY_TASK_ID is {given} in an array of {count} from {first} in steps of {step}: use indices "
            "without gaps, or name the worker"
        )
    return index

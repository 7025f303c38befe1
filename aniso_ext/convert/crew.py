"""Threads that stay from shard to shard."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Crew:
    """A few threads that start with the first task and end with :meth:`stop`.

    The allocator of C keeps what a thread has freed for that thread, in an arena that the next new thread takes over.
    Threads of each shard would so hand the arenas round, until every one of them holds the memory of a map.

    Args:
        count: threads.
        name: what their names begin with.
        start: called by each of them before its first task.
    """

    def __init__(self, count: int, name: str, start: Callable[[], None] | None = None) -> None:
        self._count, self._name, self._start = count, name, start
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, task: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Give a task to the next thread that is free."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, self._name, self._start)
        return self._pool.submit(task, *arguments, **options)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pool": None}  # threads stay in their process

    def stop(self) -> None:
        """Drop the tasks that have not begun, wait for the others and end the threads; a later task starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

"""A connection to a Ray cluster: where tasks can run, and what became of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from aniso_ext.errors import AnisoError, BackendUnavailableError, StoppedError, WorkerError

POLL_SECONDS = 0.5
"""How often a run looks whether it is to stop."""


class Cluster:
    """A connection to Ray, for as long as it is entered: that of ``RAY_ADDRESS``, else one on this machine.

    Args:
        cpus, gpus: what one task takes.
        retries: how often a task whose process died is started again.
        needed_by_others: whether the tasks wait for one another, so that none may be interrupted alone.

    Raises:
        BackendUnavailableError: Ray is not installed, or cannot start or be reached.
    """

    def __init__(self, cpus: int, gpus: int, *, retries: int = 5, needed_by_others: bool = False) -> None:
        try:
            import ray
        except ImportError:
            raise BackendUnavailableError(
                "the engine 'ray' needs Ray, which is not installed: pip install 'aniso_ext[ray]'"
            ) from None
        self._ray = ray
        self._needs = {"CPU": cpus, "GPU": gpus}
        self._retries, self._at_once = retries, needed_by_others
        self._ours = not ray.is_initialized()

    def __enter__(self) -> Cluster:
        if self._ours:
            address = os.environ.get("RAY_ADDRESS") or "local"
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            try:
                self._ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
            except Exception as error:
                where = "start on this machine" if address == "local" else f"be reached at RAY_ADDRESS {address!r}"
                raise BackendUnavailableError(f"Ray cannot {where}: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()

    def places(self) -> int:
        """How many tasks can run at the same time.

        Raises:
            BackendUnavailableError: not one.
        """
        there = self._ray.cluster_resources()
        for name, needed in self._needs.items():
            if needed > there.get(name, 0):
                reason = f"a task needs {needed} {name}s, Ray has {there.get(name, 0):g} {name}s"
                raise BackendUnavailableError(f"{reason}: ask for less, or add nodes")
        return min(int(there[name] // needed) for name, needed in self._needs.items() if needed)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a task; another process takes it over if its own dies, ``retries`` times."""
        needs: dict[str, Any] = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"]}
        return self._ray.remote(max_retries=self._retries, **needs)(function).remote(*arguments)

    def results(self, tasks: list[Any], stop: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
        """(task, result) as the tasks end; all are cancelled where one fails or ``stop`` says so."""
        waiting = tasks
        try:
            while waiting:
                ready, waiting = self._ray.wait(waiting, timeout=POLL_SECONDS)
                for task in ready:
                    yield task, self._result(task)
                if waiting and stop():
                    raise StoppedError("stopped: run the same command again to go on")
        except BaseException:
            self._cancel(waiting)
            raise

    def _result(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, (AnisoError, OSError)) else error) from None
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            times = f"{self._retries + 1} times at the same task" if self._retries else "in its task"
            raise WorkerError(
                f"a process of Ray died {times} ({reason}): look at its memory, then run the same command again"
            ) from None

    def _cancel(self, tasks: list[Any]) -> None:
        """Interrupt tasks and wait until they have ended; those that wait for others are ended at once."""
        for task in tasks:
            self._ray.cancel(task, force=self._at_once)
        if tasks:
            self._ray.wait(tasks, num_returns=len(tasks), timeout=60)

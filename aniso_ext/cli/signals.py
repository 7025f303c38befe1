"""SIGINT and SIGTERM as requests: the first one to stop soon, the second one to stop now."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from aniso_ext.errors import StoppedError


@contextlib.contextmanager
def stop_requests(in_hand: str) -> Iterator[Callable[[], bool]]:
    """Yields ``stop()``, which says whether a signal has asked to stop; ``in_hand`` is what is finished first.

    Raises:
        StoppedError: at the second signal.
    """
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        text = f"aniso: {signal.Signals(number).name}: finishing {in_hand}; a second signal discards it\n"
        os.write(2, text.encode())  # print may be what the signal has interrupted

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    except KeyboardInterrupt:
        raise StoppedError(f"stopped, {in_hand} was discarded: run the same command again to go on") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

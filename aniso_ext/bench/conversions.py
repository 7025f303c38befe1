"""One conversion in a process of its own: what it takes in time, processor and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aniso_ext.errors import DataError

_PROGRAM = """
import json, os, sys, time
from aniso_ext.align import load_aligner
from aniso_ext.convert import convert_embeddings
aligner, source, output, options = json.loads(sys.stdin.read())
aligner = load_aligner(aligner)
before, started = os.times(), time.perf_counter()
report = convert_embeddings(aligner, source, output, **options)
seconds, after = time.perf_counter() - started, os.times()
# not getrusage: its maximum includes the process that started this one
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
cpu = after.user - before.user + after.system - before.system
print(json.dumps([report.rows, report.bytes, seconds, cpu, 1024 * peak]))
"""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion; ``cpu_seconds`` are those of all its threads, ``peak_bytes`` its largest resident set."""

    rows: int
    bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds


def measure_conversion(aligner: Path, source: Path, output: Path, **options: Any) -> Conversion:
    """Convert files with a saved aligner in a fresh process; ``options`` are those of ``convert_embeddings``.

    The time is that of the conversion alone, from the opened aligner to the last synced file. Linux only.

    Raises:
        DataError: the conversion failed; the message is the last line of what it said.
    """
    arguments = json.dumps([str(aligner), str(source), str(output), options])
    done = subprocess.run([sys.executable, "-c", _PROGRAM], input=arguments, capture_output=True, text=True)
    if done.returncode:
        raise DataError((done.stderr.strip().splitlines() or ["the conversion was killed"])[-1])
    return Conversion(*json.loads(done.stdout.splitlines()[-1]))

"""Benchmarks share their cases with the tests and run on one thread."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    from aniso_ext import _build_info

    cpu = platform.processor()
    cpu_facts = Path("/proc/cpuinfo")
    if cpu_facts.is_file():
        models = [line for line in cpu_facts.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    machine_info.clear()
    machine_info.update(
        cpu=cpu,
        instruction_set=_build_info.instruction_set(),
        python=platform.python_version(),
        torch=torch.__version__,
        threads=1,
    )

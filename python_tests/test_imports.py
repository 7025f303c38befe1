"""Importing the package is cheap and touches nothing heavy; its public names are there."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

import pytest

import aniso_ext

HEAVY = ("torch", "triton", "transformers", "matplotlib", "sklearn", "pyarrow", "scipy", "rich", "typer")
NEVER = ("triton", "transformers", "matplotlib", "sklearn")
LIMIT_SECONDS = 2.0


def fresh(program: str, *, options: Sequence[str] = ()) -> str:
    """Standard output of a program in an interpreter of its own."""
    done = subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_two_seconds() -> None:
    program = "import time; t = time.perf_counter(); import aniso_ext; print(time.perf_counter() - t)"
    assert statistics.median(float(fresh(program)) for _ in range(3)) < LIMIT_SECONDS


def test_plain_import_loads_nothing_heavy() -> None:
    loaded = json.loads(fresh("import sys, json, aniso_ext; print(json.dumps(sorted(sys.modules)))"))
    assert set(HEAVY).isdisjoint(loaded)


def test_all_public_names_load_no_optional_library_and_leave_cuda_alone() -> None:
    # what torch brings along by itself is not the package's doing
    program = (
        "import sys, json, torch\n"
        f"before = [m for m in {NEVER!r} if m in sys.modules]\n"
        "import aniso_ext\n"
        "for name in aniso_ext.__all__: getattr(aniso_ext, name)\n"
        f"added = [m for m in {NEVER!r} if m in sys.modules and m not in before]\n"
        "print(json.dumps([torch.cuda.is_initialized(), added]))"
    )
    assert json.loads(fresh(program)) == [False, []]


def test_building_the_command_line_loads_no_torch() -> None:
    program = "import sys, aniso_ext.cli.main; print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    assert fresh(program).strip() == "[]"


@pytest.mark.parametrize("name", aniso_ext.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(aniso_ext, name)
    assert isinstance(value, str) or callable(value) or value.__name__ == f"aniso_ext.{name}"
    assert name in dir(aniso_ext)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = aniso_ext.no_such_name


def test_every_error_is_one_family_and_pythons_own_kind() -> None:
    errors = aniso_ext.errors
    kinds = {
        errors.InputError: ValueError,
        errors.DataError: ValueError,
        errors.ArtefactError: ValueError,
        errors.BackendUnavailableError: RuntimeError,
        errors.NotFittedError: AttributeError,
    }
    for error, kind in kinds.items():
        assert issubclass(error, errors.AnisoError)
        assert issubclass(error, kind)

"""What all commands share: exit codes, JSON, one-line errors, warnings; and the usage of every command."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from aniso_ext.cli.console import Debug, Json, Result, command, stage_bars, to_jsonable
from aniso_ext.cli.main import app
from aniso_ext.cli.methods import parse_rank
from aniso_ext.errors import DataError

COMMANDS = ("embed", "fit", "convert", "diagnose", "demo", "doctor")
runner = CliRunner()


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "aniso_ext.cli", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@command
def probe(fail: str = "", json: Json = False, debug: Debug = False) -> Result:
    print("chatter of a library")
    if fail == "known":
        raise DataError("shards/a.npy is\n  truncated")
    if fail == "file":
        raise FileNotFoundError(2, "No such file or directory", "nowhere.npy")
    if fail == "defect":
        raise KeyError("a defect")
    for _ in range(3):
        warnings.warn("only 3 rows", UserWarning, stacklevel=1)
    return Result({"ratio": math.nan, "rows": np.int64(3)}, lambda console: console.print("three rows"))


program = typer.Typer(pretty_exceptions_enable=False)
program.command()(probe)


def test_text_goes_to_standard_output_and_a_repeated_warning_appears_once() -> None:
    result = runner.invoke(program, [])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == ["chatter of a library", "three rows"]
    assert result.stderr == "aniso: warning: only 3 rows\n"


def test_json_leaves_nothing_else_on_standard_output_and_undefined_numbers_are_null() -> None:
    result = runner.invoke(program, ["--json"])
    assert json.loads(result.stdout) == {"ratio": None, "rows": 3}
    assert "chatter of a library" in result.stderr


@pytest.mark.parametrize(("kind", "message"), [("known", "shards/a.npy is truncated"), ("file", "nowhere.npy")])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_known_failure_is_one_line_and_exit_code_one(kind: str, message: str, flags: list[str]) -> None:
    result = runner.invoke(program, ["--fail", kind, *flags])
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line != "chatter of a library"]
    assert len(lines) == 1 and lines[0].startswith("aniso: error: ") and message in lines[0]
    assert "{" not in result.stdout


@pytest.mark.parametrize(("flags", "environment"), [(["--debug"], {}), ([], {"ANISO_DEBUG": "1"})])
def test_debug_keeps_the_traceback(flags: list[str], environment: dict[str, str]) -> None:
    result = runner.invoke(program, ["--fail", "known", *flags], env=environment)
    assert result.exit_code == 1 and isinstance(result.exception, DataError)


def test_a_defect_is_never_dressed_up_as_a_known_failure() -> None:
    assert isinstance(runner.invoke(program, ["--fail", "defect"]).exception, KeyError)


def test_stages_have_bars_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with stage_bars("fitting") as update:
            for step in range(1, 4):
                update("prior", step, 3)
            update("refiner", 1, 9)
        assert ("prior: step 3 of 3" in stream.getvalue()) is shown
        assert ("refiner: step 1 of 9" in stream.getvalue()) is shown


def test_json_form_of_nested_values() -> None:
    @dataclass
    class Point:
        where: Path
        values: tuple[float, ...]

    found = to_jsonable({"p": Point(Path("a"), (1.0, math.inf)), "a": np.array([[1, 2]]), "t": True, "n": None})
    assert found == {"p": {"where": "a", "values": [1.0, None]}, "a": [[1, 2]], "t": True, "n": None}
    with pytest.raises(TypeError, match="object"):
        to_jsonable(object())


@pytest.mark.parametrize(("text", "value"), [(None, None), ("128", 128), ("2", 2), ("0.9", 0.9), ("64.0", 64)])
def test_rank_is_an_even_number_or_a_share(text: str | None, value: float | None) -> None:
    found = parse_rank(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["0", "-2", "3", "2.5", "many", "nan", "inf", ""])
def test_other_ranks_are_bad_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_rank(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_says_what_it_does_and_gives_examples(name: str) -> None:
    result = runner.invoke(app, [name, "--help"])
    assert result.exit_code == 0 and "--json" in result.stdout
    assert f"aniso {name}" in result.stdout or name == "doctor"


def test_help_and_version_of_the_program() -> None:
    done = shell("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS) and "Exit codes" in done.stdout
    version = shell("--version")
    assert version.returncode == 0 and version.stdout.startswith("aniso ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Usage"),
        (["embroider"], "embroider"),
        (["fit", "--source", "a"], "--target"),
        (["fit", "--source", "a", "--target", "b", "--out", "c", "--rank", "7"], "--rank"),
        (["fit", "--source", "a", "--target", "b", "--out", "c", "--method", "magic"], "magic"),
        (["fit", "--source", "a", "--target", "b", "--out", "c", "--method", "realign", "--rank", "8"], "--rank"),
        (["convert", "--aligner", "a", "--input", "b"], "--output"),
        (["convert", "--aligner", "a", "--input", "b", "--output", "c", "--calibration", "guess"], "--calibration"),
        (["diagnose", "--source", "a", "--target", "b"], "--out"),
        (["diagnose", "--source", "a", "--target", "b", "--out", "c", "stray"], "stray"),
        (["demo", "--source", "a"], "--target"),
        (["demo", "--methods", "realign,magic"], "magic"),
        (["demo", "--methods", ","], "--methods"),
        (["demo", "--source", "a", "--target", "b", "--width", "64"], "--width"),
        (["doctor", "--loud"], "--loud"),
    ],
)
def test_bad_usage_is_exit_code_two_and_names_the_option(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert named in result.output
    assert list(tmp_path.iterdir()) == []

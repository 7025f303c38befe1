"""The README tells the truth: its quick starts run, its links and options exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aniso_ext.cli.main import app

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [f"docs/{name}.md" for name in ("cli", "architecture", "encode", "shapes")]


def blocks(heading: str, text: str = README) -> list[tuple[str, str]]:
    """(language, code) of the fenced blocks between a heading and the next one of its level."""
    level = heading.split(" ")[0]
    section = text.split(f"\n{heading}\n", 1)[1].split(f"\n{level} ", 1)[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def execute(found: list[tuple[str, str]], folder: Path) -> str:
    """Run blocks one after the other in a folder, with this interpreter and its `aniso`; everything they printed."""
    shim = folder / ".bin" / "aniso"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m aniso_ext.cli "$@"\n')
    shim.chmod(0o755)
    path = os.pathsep.join((str(shim.parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    printed = []
    for language, code in found:
        interpreter = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}[language]
        done = subprocess.run(
            [*interpreter, code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        printed.append(done.stdout)
    return "".join(printed)


def test_python_quick_start_runs(tmp_path: Path) -> None:
    found = blocks("## Python")
    assert found and {language for language, _ in found} == {"python"}
    printed = execute(found, tmp_path)
    assert "alignment of" in printed and (tmp_path / "aligner" / "model.safetensors").is_file()


def test_command_line_quick_start_runs(tmp_path: Path) -> None:
    found = blocks("## Command line")
    assert [language for language, _ in found] == ["python", "bash"]
    printed = execute(found, tmp_path)
    assert "anisoalign" in printed and (tmp_path / "report" / "report.md").is_file()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    pages = README + (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in re.findall(r"^(?:`|- `|    )?make ([a-z-]+)", pages, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_paths_exist(page: str) -> None:
    path = REPOSITORY / page
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:aniso_ext|csrc|python_tests|docs|benchmarks)/[\w./]*)`", text):
        assert (REPOSITORY / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_options_on_a_page_are_options_of_the_command(page: str) -> None:
    import typer

    program = typer.main.get_command(app)
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / page).read_text(encoding="utf-8"))
    commands = {**program.commands, **{f"bench {name}": c for name, c in program.commands["bench"].commands.items()}}
    for name, rest in re.findall(r"\baniso (embed|fit|convert|diagnose|demo|doctor|bench \w+)\b([^`\n]*)", text):
        known = {option for parameter in commands[name].params for option in parameter.opts}
        known |= {option for parameter in commands[name].params for option in parameter.secondary_opts}
        assert set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", rest)) <= known, (name, rest)


def test_every_method_is_in_the_method_table() -> None:
    from aniso_ext import list_aligners

    assert [name for name in list_aligners() if f"| `{name}` |" not in README] == []

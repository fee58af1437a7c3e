"""README and docs keep up with the code: what they name exists, and every command in them runs."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import edgetrain
from edgetrain.cli.main import COMMANDS, EPILOG, cli
from edgetrain.config import Settings, find_profile, read_profile
from edgetrain.training.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README": README, **PAGES}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The edgetrain commands of a page, but for those that begin by installing it."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [line.partition("  #")[0] for line in lines if line.startswith("edgetrain ")]


#: What each command prints, if it did what it is for.
EXPECTED = {
    "fit": "test accuracy 0.",
    "plan": "the smallest budget that works is",
    "profile": "MiB per additional layer",
    "evaluate": "(the method's own)",
    "predict": "row,label",
    "cells": "accuracy",
    "report": "report.html",
    "methods": "Mono-Forward",
    "nets": "mlp:",
    "data": "digits",
    "doctor": "machine",
}


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if commands(text)])
def test_every_command_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for command in commands(TEXTS[page]):
        cli.main(shlex.split(command)[1:], standalone_mode=False)
        assert EXPECTED[command.split()[1]] in capsys.readouterr().out, command


def test_the_readme_prints_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Accuracies may differ a little between machines; what a plan says may not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan, fit, evaluate, _ = commands(README)
    _, planned, evaluated = blocks(README, "text")
    cli.main(shlex.split(plan)[1:], standalone_mode=False)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert printed[: len(planned.splitlines())] == planned.splitlines()
    for command in (fit, evaluate):
        capsys.readouterr()
        cli.main(shlex.split(command)[1:], standalone_mode=False)
    found, expected = (
        [float(number) for number in re.findall(r"0\.\d{4}", text)] for text in (capsys.readouterr().out, evaluated)
    )
    assert len(found) == len(expected) == 2
    assert found == pytest.approx(expected, abs=0.03)


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(PAGES["python"], "python")), {})
    assert 0 < float(capsys.readouterr().out.split()[0]) <= 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`edgetrain {command}" in README


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_linked_in_the_readme_and_its_links_lead_somewhere(page: str) -> None:
    assert f"(docs/{page}.md)" in README
    for text, folder in ((README, ROOT), (PAGES[page], ROOT / "docs")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (folder / target).exists(), target


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_in_the_docs_with_what_it_needs(method: str) -> None:
    row = next(line for line in PAGES["methods"].splitlines() if line.startswith(f"| `{method}` |"))
    assert all(cell.strip() for cell in row.strip("|").split("|"))
    assert len(row.split("|")) == 6
    assert METHODS[method].citation
    assert METHODS[method].needs


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 70, 130, 143])
def test_exit_codes_are_in_help_and_docs(code: int) -> None:
    for text in (EPILOG, README, PAGES["reliability"]):
        assert re.search(rf"\b{code}\b", text[text.index("xit codes") :])


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_can_be_read_and_says_what_to_expect(path: Path) -> None:
    Settings().with_values(read_profile(find_profile(path.stem)))
    assert path.read_text().startswith("#")


def test_the_first_command_comes_within_the_first_screen() -> None:
    first = next(number for number, line in enumerate(README.splitlines()) if "edgetrain fit" in line)
    assert first < 24


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page: str) -> None:
    folders = "edgetrain|training|planning|objectives|stream|nets|benchmarks|tests"
    for name in re.findall(rf"`((?:{folders})/[\w/.]+)`", TEXTS[page]):
        assert (ROOT / name).exists() or (ROOT / "edgetrain" / name).exists(), name


def test_files_in_the_map_of_the_code_exist() -> None:
    names = {path.name for path in (ROOT / "edgetrain").rglob("*.py")}
    found = set(re.findall(r"\b(\w+\.py)\b", PAGES["code"]))
    assert len(found) > 30
    assert found <= names


BATCH_PATH = ("stream/reader.py", "stream/executor.py", "stream/cell.py", "stream/latents.py")


def imported(path: Path) -> set[Path]:
    """Files of the package that a file imports, also those that it imports for their types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgetrain"):
            module = ROOT / (node.module or "").replace(".", "/")
            names = [module / name.name for name in node.names]
            found |= {each.with_suffix(".py") for each in (module, *names) if each.with_suffix(".py").exists()}
    return found


def test_a_batch_passes_the_four_files_that_the_readme_names() -> None:
    """From the loop, imports lead to the reader and the cell, and from these to files on either side."""
    line = next(line for line in README.splitlines() if line.startswith("A batch passes"))
    assert tuple(re.findall(r"`(stream/\w+\.py)`", line)) == BATCH_PATH
    reader, executor, cell, latents = (ROOT / "edgetrain" / name for name in BATCH_PATH)
    assert {reader, cell} <= imported(executor)
    assert reader in imported(cell)
    disk = ROOT / "edgetrain" / "store" / "latents.py"
    others = {path for path in (ROOT / "edgetrain" / "stream").glob("*.py") if path not in (reader, latents)}
    assert disk in imported(reader)
    assert disk in imported(latents)
    # Nothing else of the stream opens files of latents, but for a span's type of rows.
    assert {path.name for path in others if disk in imported(path)} == {"span.py"}


def test_the_objective_in_the_docs_trains(tmp_path: Path) -> None:
    code = re.search(r"<!-- my_rule.py -->\n```python\n(.*?)```", PAGES["extending"], re.DOTALL)
    assert code is not None
    (tmp_path / "my_rule.py").write_text(code[1])
    method = f"{tmp_path}/my_rule.py:MyRule"
    run = edgetrain.fit("mlp:64x2", "digits", method, run_dir=tmp_path / "r", epochs=8, device="cpu", tiles=2)
    assert (run.record.test_accuracy or 0) > 0.8

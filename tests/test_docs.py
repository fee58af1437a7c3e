"""The README keeps up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgetrain.cli.main import COMMANDS, EPILOG
from edgetrain.config import Settings, find_profile, read_profile
from edgetrain.training.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`edgetrain {command}" in README


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_in_the_readme_with_what_it_needs(method: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{method}` |"))
    assert len(row.split("|")) == 6
    assert METHODS[method].citation
    assert METHODS[method].needs


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 70, 130, 143])
def test_exit_codes_are_in_help_and_readme(code: int) -> None:
    assert re.search(rf"\b{code}\b", EPILOG)
    assert re.search(rf"\b{code}\b", README)


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_can_be_read_and_says_what_to_expect(path: Path) -> None:
    Settings().with_values(read_profile(find_profile(path.stem)))
    assert path.read_text().startswith("#")


def test_the_first_command_comes_within_the_first_screen() -> None:
    first = next(number for number, line in enumerate(README.splitlines()) if "edgetrain fit" in line)
    assert first < 20


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:edgetrain|training|planning|objectives|benchmarks|tests)/[\w/.]+)`", README):
        assert (ROOT / name).exists() or (ROOT / "edgetrain" / name).exists(), name

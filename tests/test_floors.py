"""The package is layered: a file imports only from its own folder and from folders above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "edgetrain"
CORE = ["errors", "units", "keys", "openmp", "plugins", "config", "record"]
FLOORS = [
    *CORE,
    "memory",
    "store",
    "data",
    "nets",
    "objectives",
    "baselines",
    "stream",
    "planning",
    "training",
    "report",
    "api",
    "cli",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def imported(path: Path) -> set[str]:
    """The modules of edgetrain that a file imports, as dotted names below the package."""
    names = set()
    tree = ast.parse(path.read_text())
    if path.name == "run.py":  # ``Run.report`` is the one call upwards, imported when it is called
        tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edgetrain."):
            names.add(node.module.removeprefix("edgetrain."))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_floors_above(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imported(path):
        floor = name.partition(".")[0]
        assert FLOORS.index(floor) <= FLOORS.index(own), f"{path.name} is on {own}, imports {name}"


def test_files_do_not_import_each_other_in_circles() -> None:
    graph = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): imported(path) for path in FILES}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        for following in graph.get(name, ()):
            visit(following, (*trail, name))

    for name in graph:
        visit(name, ())


def test_no_file_is_longer_than_500_lines() -> None:
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 500


def test_the_machine_names_no_method() -> None:
    from edgetrain.training.methods import METHODS

    for floor in ("stream", "planning", "training"):
        for path in (PACKAGE / floor).glob("*.py"):
            named = methods_named(path.read_text(), METHODS)
            assert named <= RECOMMENDED.get(path.name, set()), path


#: Methods that a message recommends; nothing is decided by them.
RECOMMENDED = {"job.py": {"mf", "bp", "bp-checkpoint"}, "words.py": {"bp"}}


def methods_named(source: str, methods: Iterable[str]) -> set[str]:
    """The methods that a file's code names, also within longer strings; docstrings do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {name for name in methods for text in texts if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)}


@pytest.mark.parametrize("code", ["if name == 'mf': ...", "x = 'use mf, or not'", "f'{a} mf'", "{'mf': 1}"])
def test_a_method_that_is_named_is_found(code: str) -> None:
    assert methods_named(code, ["mf", "bp"]) == {"mf"}
    assert methods_named(f'"""mf."""\nx = "comfy"\n{code.replace("mf", "m")}', ["mf", "bp"]) == set()

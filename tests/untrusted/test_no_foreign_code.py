"""No untrusted file is ever run: no pickle, no eval, no archive unpacked by its own names.

``pytest tests/untrusted/test_no_foreign_code.py``.
"""

from __future__ import annotations

import ast
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgetrain
from edgetrain.data.specs import open_data, open_rows
from edgetrain.errors import EdgetrainError, InputError
from edgetrain.store.tensors import read_header, read_tensors

PACKAGE = Path(edgetrain.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_IMPORTS = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg"),
    *("yaml", "jsonpickle", "code", "runpy"),
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("extractall", "unpack_archive", "system", "popen", "import_module", "exec_module", "load_module", "hub"),
}
#: Calls that say what they load and are safe only with a word added.
NEEDS = {"torch.load": ("weights_only", True)}
FORBIDS = {"allow_pickle": True, "shell": True, "weights_only": False}
#: What is allowed where, and why: subcommands by a fixed list of names; the user's own net, which the user names.
ALLOWED = {("cli/main.py", "import_module"), ("plugins.py", "exec_module")}


def findings(source: str, where: str = "") -> Iterator[str]:
    """What in a source could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        for word in _words(node):
            if (where, word) not in ALLOWED:
                yield f"{where}:{getattr(node, 'lineno', 0)}: {word}"


def _words(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_IMPORTS)
    elif isinstance(node, ast.ImportFrom):
        if (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            yield str(node.module)
        yield from (alias.name for alias in node.names if alias.name in FORBIDDEN_CALLS | FORBIDDEN_NAMES)
    elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
        yield node.id
    elif isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_CALLS:
        yield node.attr
    elif isinstance(node, ast.Call):
        yield from _unsafe(node)


def _unsafe(call: ast.Call) -> Iterator[str]:
    stated = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    yield from (f"{word}={value}" for word, value in FORBIDS.items() if stated.get(word, not value) is not (not value))
    name = ast.unparse(call.func)
    if name in NEEDS and stated.get(NEEDS[name][0]) is not NEEDS[name][1]:
        yield name
    if name in ("np.load", "numpy.load") and stated.get("allow_pickle") is not False:
        yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_can_run_what_it_reads(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as harmless",
        "from pickle import loads",
        "from joblib.numpy_pickle import load",
        "eval('1')",
        "run = exec",
        "__import__('os')",
        "from builtins import eval as f",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "save(x, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "tar.extractall('/')",
        "shutil.unpack_archive('x')",
        "from shutil import unpack_archive",
        "importlib.import_module(name)",
        "torch.hub.load('x', 'y')",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x', weights_only=True)",
        "np.load('x', allow_pickle=False)",
        "model.eval()",
        "re.compile('x')",
        "subprocess.run(['ls'])",
        "safe_open('x', framework='pt')",
    ],
)
def test_the_search_leaves_harmless_code_alone(source: str) -> None:
    assert not list(findings(source))


def test_each_exception_is_still_needed() -> None:
    found = {(where, word) for where, word in ALLOWED if word in (PACKAGE / where).read_text(encoding="utf-8")}
    assert found == ALLOWED


# --- and when it runs ---------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "struck")))
    assert (tmp_path / "struck").is_dir()


def npz(path: Path, bomb: Bomb) -> None:
    objects = np.array([bomb] * 10, object)
    np.savez(path, x=objects, y=objects, x_train=objects, y_train=objects)


def torch_file(path: Path, bomb: Bomb) -> None:
    torch.save({"w": bomb}, path)


def bare_pickle(path: Path, bomb: Bomb) -> None:
    path.write_bytes(pickle.dumps(bomb))


def npy_file(path: Path, bomb: Bomb) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([bomb], object))
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("write", [npz, torch_file, bare_pickle, npy_file])
def test_a_pickle_by_any_name_is_refused_and_never_run(write: Any, tmp_path: Path) -> None:
    path, bomb = tmp_path / "some.npz", Bomb(tmp_path / "struck")
    write(path, bomb)
    for read in (open_data, open_rows):
        with pytest.raises(EdgetrainError, match=str(path)):
            read(str(path))
    for reader in (read_tensors, read_header):
        with pytest.raises(EdgetrainError, match=str(path)):
            reader(path)
    assert not bomb.path.exists()


def test_labels_that_are_objects_are_refused_and_never_run(tmp_path: Path) -> None:
    path, bomb = tmp_path / "some.npz", Bomb(tmp_path / "struck")
    np.savez(path, x=np.zeros((10, 2), np.uint8), y=np.array([bomb] * 10, object))
    with pytest.raises(InputError, match="never read"):
        open_data(str(path))
    assert not bomb.path.exists()

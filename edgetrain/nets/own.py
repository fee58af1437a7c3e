"""The user's own net: ``path/to/net.py:function``, or modules handed over in Python.

The function returns a list of modules, an ``nn.Sequential``, or yields modules one by one. It is
called under the run's seed, so that each call builds the same net; a generator lets a net that is
larger than the host's memory be built cell by cell.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgetrain.errors import InputError
from edgetrain.keys import seeded
from edgetrain.nets.base import CellRecipe

Build = Callable[[], Any]


def load_function(spec: str) -> Build:
    """The function that ``path/to/net.py:function`` names; the only code of a user that is ever run.

    Raises:
        InputError: no such file or function, or the file fails when it is imported.
    """
    path, _, name = spec.rpartition(":")
    if not _is_file(path):
        raise InputError(f"net {spec!r}: there is no file {path}; expected path/to/net.py:function")
    module_spec = importlib.util.spec_from_file_location(f"_edgetrain_net_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"net {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and others look for it
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"net {spec!r}: {path} fails on import: {_said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"net {spec!r}: {path} has no function {name!r}")
    build: Build = function
    return build


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # the name is too long, or a folder on the way may not be read
        return False


def cells(spec: str, build: Build, in_shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[CellRecipe]:
    """The recipes of a user's net, with the shapes found by running its modules on the meta device.

    Args:
        spec: what the net is called in messages.
        build: gives the modules.
        in_shape: of one sample of the data set.
        dtype: of the data set's rows as the first module sees them; later ones see float32.

    Raises:
        InputError: it is not made of modules, or they do not fit the data or each other.
    """
    with torch.device("meta"):
        skeletons = list(_modules(spec, build))
    if not skeletons:
        raise InputError(f"net {spec!r}: has no modules; expected at least one")
    recipes, shape = [], in_shape
    for index, skeleton in enumerate(skeletons):
        recipes.append(_cell(spec, build, index, skeleton, torch.empty(2, *shape, dtype=dtype, device="meta")))
        shape, dtype = recipes[-1].out_shape, torch.float32
    return recipes


def given(modules: Iterable[nn.Module]) -> Build:
    """A build function for modules that exist: each call gives copies with the same values."""
    kept = list(modules)
    return lambda: (_copy(module) for module in kept)


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy; under ``torch.device("meta")`` one without values, so that planning takes no memory."""
    if torch.empty(0).device.type != "meta":
        return deepcopy(module)
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare
    return deepcopy(module, memo)


def _modules(spec: str, build: Build) -> Iterator[nn.Module]:
    try:
        built = build()
        if not isinstance(built, Iterable):
            raise InputError(f"net {spec!r}: gave a {type(built).__name__}; expected a list of nn.Modules")
        for module in built:
            if not isinstance(module, nn.Module):
                raise InputError(f"net {spec!r}: gave a {type(module).__name__}; expected nn.Modules")
            yield module
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        raise InputError(f"net {spec!r}: its function fails: {_said(error)}") from error


def _take(spec: str, build: Build, index: int) -> nn.Module:
    return next(islice(_modules(spec, build), index, None))


def _cell(spec: str, build: Build, index: int, skeleton: nn.Module, x: torch.Tensor) -> CellRecipe:
    """The recipe of a module that reads rows like ``x``, [2, *in_shape]."""
    in_shape, out_shape = tuple(x.shape[1:]), _run(spec, index, skeleton, x)
    kinds = [type(part) for part in skeleton.modules()]
    shapes = tuple((name, tuple(value.shape)) for name, value in skeleton.state_dict().items())
    return _OwnCell(
        name=f"{type(skeleton).__name__} {index}",
        in_shape=in_shape,
        out_shape=out_shape,
        build=partial(_take, spec, build, index),
        signature=("own", in_shape, out_shape, shapes, repr(skeleton)),
        draws=True,  # whether a stranger's module draws cannot be known: it always gets its key
        couples_batch=any(issubclass(kind, _BatchNorm) for kind in kinds),
    )


class _OwnCell(CellRecipe):
    """A cell of a user's net: every cell draws from the one stream of its whole build."""

    def materialise(self, seed: int, index: int) -> nn.Module:
        """See ``CellRecipe.materialise``; the key is the net's, as the user's function is one program."""
        with seeded(seed, "net"):
            return self.build()


def _said(error: Exception) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _run(spec: str, index: int, module: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    """Shape of the module's output for one sample of ``x``, [2, *in_shape]."""
    try:
        with _embeddings_checked(spec, module, x) if index == 0 else nullcontext():
            out = module(x)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"net {spec!r}: module {index} ({type(module).__name__}) does not take rows of shape"
            f" {tuple(x.shape[1:])}: {_said(error)}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.ndim < 2 or out.shape[0] != 2:
        raise InputError(f"net {spec!r}: module {index} ({type(module).__name__}) must give one tensor [B, ...]")
    if not out.is_floating_point():
        raise InputError(
            f"net {spec!r}: module {index} ({type(module).__name__}) must give floating-point numbers;"
            f" it gave {_dtype(out)} for rows of {_dtype(x)}"
        )
    return tuple(out.shape[1:])


@contextmanager
def _embeddings_checked(spec: str, module: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Refuse an embedding of rows ``x`` that are not token ids: as indices they mean nothing."""

    def check(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if x.is_floating_point() and inputs and inputs[0].numel() == x.numel():
            raise InputError(
                f"net {spec!r}: its {type(layer).__name__} takes token ids, but the rows are numbers of shape"
                f" {tuple(x.shape[1:])}; state --input tokens if they are ids"
            )

    embeddings = [part for part in module.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))]
    hooks = [part.register_forward_pre_hook(check) for part in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")

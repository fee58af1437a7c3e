"""The user's own net: ``path/to/net.py:function``, or modules given in Python.

The function returns a list of modules or an ``nn.Sequential``, or yields modules one by one. It is called once,
under the run's seed, and one copy of each module stays on the host; every visit trains a copy of that.
A generator is run again for each cell instead, so that a net may be larger than the host's memory.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edgetrain.errors import InputError
from edgetrain.keys import generator, seeded
from edgetrain.nets.base import CellRecipe, Tie
from edgetrain.nets.copying import cloned, named_tensors, on_host, on_meta
from edgetrain.nets.trial import ROWS, Trial, attributes, check_memory, copy_inputs_of, said, try_module
from edgetrain.plugins import load

Build = Callable[[], Any]
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Inputs:
    """What the first module reads.

    Attributes:
        shape: of one sample.
        vocabulary: the number of token ids if rows are int64 token ids; ``None``: rows are float32.
        reads: shape of one sample that the method makes of it; a user's first module may read either.
    """

    shape: tuple[int, ...]
    vocabulary: int | None
    reads: tuple[int, ...]

    def candidates(self, seed: int) -> list[Tensor]:
        """Random rows to try the first module on, [ROWS, ...], those that the method would like best first."""
        source = generator("cpu", seed, "trial")
        if self.vocabulary is not None:
            return [torch.randint(0, self.vocabulary, (ROWS, *self.shape), generator=source)]
        return [torch.randn(ROWS, *shape, generator=source) for shape in dict.fromkeys((self.reads, self.shape))]


class _OwnCell(CellRecipe):
    """A cell of the user's net: a generator draws all cells' weights from one stream."""

    def materialise(self, seed: int, index: int) -> nn.Module:
        """See ``CellRecipe.materialise``; the key is the net's, as the user's function is one program."""
        with seeded(seed, "net"):
            return self.build()


def load_function(spec: str) -> Build:
    """The function that ``path/to/net.py:function`` names.

    Raises:
        InputError: no such file or function, or the file fails when it is imported.
    """
    build = load(spec, "net")
    if not callable(build):
        raise InputError(f"net {spec!r}: {spec.rpartition(':')[2]!r} is not a function")
    found: Build = build
    return found


def cells(spec: str, build: Build, inputs: Inputs, seed: int) -> list[CellRecipe]:
    """The recipes of a user's net; its function is called once, and each module tried on a few rows.

    Args:
        spec: what the net is called in messages.
        build: gives the modules.
        inputs: what the first module reads; later ones read float32.
        seed: of the run, under which ``build`` is called.

    Raises:
        InputError: it is not made of modules, or one of them does not fit the data or its neighbours, or cannot
            be trained cell by cell.
    """
    with seeded(seed, "net"):
        built = _called(spec, build)
        if iter(built) is built:
            return _generated(spec, partial(_called, spec, build), built, inputs, seed)
        whole = nn.ModuleList(_checked(spec, built))
        check_memory(whole, f"net {spec!r}")
        if any(value.device.type != "cpu" for _, value in named_tensors(whole)):
            whole = on_host(whole)
    return _kept(spec, list(whole), inputs, seed)


def given(spec: str, modules: Iterable[nn.Module], inputs: Inputs, seed: int) -> list[CellRecipe]:
    """The recipes of modules that exist; these are copied once and never changed.

    Raises:
        InputError: as ``cells``.
    """
    whole = nn.ModuleList(_checked(spec, modules))  # copied together, so that tied weights stay tied
    check_memory(whole, f"net {spec!r}")
    try:
        copies = deepcopy(whole) if _is_lazy(whole) else on_host(whole)
    except Exception as error:
        raise InputError(f"net {spec!r}: its modules cannot be copied: {said(error)}") from error
    return _kept(spec, list(copies), inputs, seed)


def _called(spec: str, build: Build) -> Iterable[Any]:
    try:
        built = build()
    except Exception as error:
        raise InputError(f"net {spec!r}: its function fails: {said(error)}") from error
    if not isinstance(built, Iterable):
        raise InputError(f"net {spec!r}: gave a {type(built).__name__}; expected a list of nn.Modules")
    return built


def _checked(spec: str, modules: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules, where they are modules.

    Raises:
        InputError: something else is among them, or a generator fails.
    """
    following = iter(modules)
    while True:
        try:
            module = next(following)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(f"net {spec!r}: its function fails: {said(error)}") from error
        if not isinstance(module, nn.Module):
            raise InputError(f"net {spec!r}: gave a {type(module).__name__}; expected nn.Modules")
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):  # torch.compile's
            raise InputError(f"net {spec!r}: gave a compiled {type(module).__name__}; give the nn.Module itself")
        yield module


class _Ties:
    """Knows tensors of earlier cells again."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def of(self, index: int, module: nn.Module) -> tuple[Tie, ...]:
        """The tensors of cell ``index`` that are tensors of earlier cells."""
        found = []
        for name, tensor in named_tensors(module):
            reference, cell, other = self._seen.get(id(tensor), (None, 0, ""))
            if reference is not None and reference() is tensor:
                found.append((name, cell, other))
            else:
                self._seen[id(tensor)] = weakref.ref(tensor), index, name
        return tuple(found)


def _kept(spec: str, modules: Sequence[nn.Module], inputs: Inputs, seed: int) -> list[CellRecipe]:
    """Recipes that copy modules which stay on the host."""
    rows, ties = inputs.candidates(seed), _Ties()
    recipes: list[CellRecipe] = []
    for index, module in enumerate(modules):
        with seeded(seed, "lazy", index):
            x, trial, _ = _tried(module, rows, _name(spec, index, module))
        size = sum(value.nbytes for _, value in named_tensors(module))
        recipe = _recipe(index, module, x, trial, partial(_copied, module))
        recipes.append(replace(recipe, tied=ties.of(index, module), kept_bytes=size))
        rows = [trial.out]
    return _some(spec, recipes)


def _generated(
    spec: str, call: Callable[[], Iterable[Any]], first: Iterable[Any], inputs: Inputs, seed: int
) -> list[CellRecipe]:
    """Recipes that run a generator again up to their module; one module at a time is in memory."""
    rows, ties = inputs.candidates(seed), _Ties()
    recipes: list[CellRecipe] = []
    tried: dict[Hashable, _Tried] = {}  # of modules that are alike
    for index, module in enumerate(_checked(spec, first)):
        name = _name(spec, index, module)
        check_memory(module, name)
        if _is_lazy(module):
            raise InputError(f"{name} has lazy layers, which need a list of modules instead of a generator")
        kind = tuple(rows[0].shape), _signature(module), str(attributes(module))
        if kind not in tried:
            tried[kind] = _tried(module, rows, name)
        x, trial, flattens = tried[kind]
        build = partial(_taken, spec, call, index, trial.changes_input, flattens)
        recipes.append(replace(_recipe(index, module, x, trial, build), tied=ties.of(index, module)))
        rows = [trial.out]
    return _some(spec, recipes)


def _some(spec: str, recipes: list[CellRecipe]) -> list[CellRecipe]:
    if not recipes:
        raise InputError(f"net {spec!r}: has no modules; expected at least one")
    return recipes


def _name(spec: str, index: int, module: nn.Module) -> str:
    return f"net {spec!r}: module {index + 1} ({type(module).__name__})"


_Tried = tuple[Tensor, Trial, bool]  # the rows that a module read, its trial, and whether it reads them flattened


def _tried(module: nn.Module, rows: Sequence[Tensor], name: str) -> _Tried:
    """Try a module on the first rows of those given that it takes; images also flattened, as dense layers read them.

    Raises:
        InputError: it takes none.
    """
    x, *others = rows
    _check_embeddings(module, x, name)
    try:
        _initialise(module, x, name)
        return x, try_module(module, x, name), False
    except InputError as refused:
        if others:
            return _tried(module, others, name)
        if x.ndim < 3:
            raise
        handle = module.register_forward_pre_hook(_flattened)
        try:
            return x, try_module(module, x, name), True
        except InputError:
            handle.remove()
            raise refused from None


def _check_embeddings(module: nn.Module, x: Tensor, name: str) -> None:
    """Refuse an embedding of rows ``x`` that are numbers: as indices they mean nothing.

    Raises:
        InputError: an embedding reads them.
    """
    if not x.is_floating_point() or not any(isinstance(part, _EMBEDDINGS) for part in module.modules()):
        return

    def check(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].numel() == x.numel():
            raise InputError(
                f"{name}: its {type(layer).__name__} takes token ids, but the rows are numbers of shape"
                f" {tuple(x.shape[1:])}; state --input tokens if they are ids"
            )

    copy = cloned(module).eval()
    for part in copy.modules():
        if isinstance(part, _EMBEDDINGS):
            part.register_forward_pre_hook(check)
    with torch.no_grad(), suppress(RuntimeError, IndexError, TypeError, ValueError):  # the trial names other faults
        copy(x)


def _flattened(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.flatten(1) if isinstance(value, Tensor) else value for value in inputs)


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(value) for value in [*module.parameters(), *module.buffers()])


def _initialise(module: nn.Module, x: Tensor, name: str) -> None:
    """Let lazy layers find their shapes, by running the module once.

    Raises:
        InputError: it fails.
    """
    if not _is_lazy(module):
        return
    try:
        with torch.no_grad():
            module(x)
    except Exception as error:
        raise InputError(f"{name} fails on rows of shape {tuple(x.shape[1:])}: {said(error)}") from error


def _copied(module: nn.Module) -> nn.Module:
    return on_meta(module) if torch.empty(0).is_meta else cloned(module)


def _taken(spec: str, call: Callable[[], Iterable[Any]], index: int, changes_input: bool, flattens: bool) -> nn.Module:
    """The module of that number out of a fresh run of the generator."""
    module = next(islice(_checked(spec, call()), index, None))
    if flattens:
        module.register_forward_pre_hook(_flattened)
    if changes_input:
        copy_inputs_of(module)
    return module


def _recipe(index: int, module: nn.Module, x: Tensor, trial: Trial, build: Callable[[], nn.Module]) -> CellRecipe:
    in_shape, out_shape = tuple(x.shape[1:]), tuple(trial.out.shape[1:])
    return _OwnCell(
        name=f"{type(module).__name__} {index}",
        in_shape=in_shape,
        out_shape=out_shape,
        build=build,
        signature=("own", in_shape, out_shape, _signature(module)),
        draws=True,  # whether a user's module draws cannot be known: it always gets its key
        couples_batch=trial.couples_batch,
        needs_values=trial.needs_values,
        behaviour=trial.behaviour,
    )


def _signature(module: nn.Module) -> Hashable:
    """Names, shapes and kinds of a module's tensors, and what it says of itself."""
    tensors = tuple(
        (name, tuple(value.shape), str(value.dtype), value.requires_grad) for name, value in named_tensors(module)
    )
    modes = tuple(part.training for part in module.modules())
    return tensors, modes, _ADDRESS.sub("", repr(module))

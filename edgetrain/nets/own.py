"""The user's own net: ``path/to/net.py:function``, or modules given in Python.

The function returns a list of modules or an ``nn.Sequential``, or yields modules one by one. It is called once,
under the run's seed, and one copy of each module stays on the host; every visit trains a copy of that.
A generator is run again for each cell instead, so that a net may be larger than the host's memory.
``nets/grouping.py`` says which modules form a cell.
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
from edgetrain.nets.grouping import grouped, is_output, layer_of
from edgetrain.nets.memory_format import prefers_channels_last
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
        classes: number of classes. A final ``nn.Linear`` with this many outputs is the output layer. ``None``: the net
            has no output layer.
    """

    shape: tuple[int, ...]
    vocabulary: int | None
    reads: tuple[int, ...]
    classes: int | None = None

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


@dataclass(frozen=True)
class Recipes:
    """What a user's net is made of.

    Attributes:
        cells: the recipes of the cells.
        output: the recipe of the output layer; ``None``: the net has none.
    """

    cells: list[CellRecipe]
    output: CellRecipe | None


def cells(spec: str, build: Build, inputs: Inputs, seed: int) -> Recipes:
    """The recipes of a user's net; its function is called once, and each cell tried on a few rows.

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


def given(spec: str, modules: Iterable[nn.Module], inputs: Inputs, seed: int) -> Recipes:
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


def _kept(spec: str, modules: Sequence[nn.Module], inputs: Inputs, seed: int) -> Recipes:
    """Recipes that copy modules which stay on the host."""
    chain = _Chain(spec, inputs, seed)
    for group in grouped(modules, inputs.classes):
        cell = _one(group)
        with seeded(seed, "lazy", len(chain.recipes)):
            x, trial, _ = _tried(cell, chain.rows, chain.name(group))
        chain.add(group, cell, x, trial, partial(_copied, cell))
    return chain.recipes_of()


def _generated(
    spec: str, call: Callable[[], Iterable[Any]], first: Iterable[Any], inputs: Inputs, seed: int
) -> Recipes:
    """Recipes that run a generator again up to their modules; three cells at a time are in memory."""
    chain = _Chain(spec, inputs, seed)
    tried: dict[Hashable, _Tried] = {}  # of cells that are alike
    for number, group in enumerate(grouped(_checked(spec, first), inputs.classes)):
        cell, name = _one(group), chain.name(group)
        check_memory(cell, name)
        if _is_lazy(cell):
            raise InputError(f"{name} has lazy layers, which need a list of modules instead of a generator")
        kind = tuple(chain.rows[0].shape), _signature(cell), str(attributes(cell))
        if kind not in tried:
            tried[kind] = _tried(cell, chain.rows, name)
        x, trial, flattens = tried[kind]
        build = partial(_taken, spec, call, number, inputs.classes, trial.changes_input, flattens)
        chain.add(group, cell, x, trial, build, kept=False)
    return chain.recipes_of()


class _Chain:
    """Collects the recipes of a net's cells.

    Attributes:
        rows: on which the next cell is tried.
        recipes: of the cells so far.
    """

    def __init__(self, spec: str, inputs: Inputs, seed: int):
        self._spec, self._inputs, self._ties = spec, inputs, _Ties()
        self.rows = inputs.candidates(seed)
        self.recipes: list[CellRecipe] = []
        self._ends_in_output = False

    def name(self, group: Sequence[nn.Module]) -> str:
        """What a cell is called in messages."""
        return f"net {self._spec!r}: cell {len(self.recipes) + 1} ({_classes(group)})"

    def add(
        self,
        group: list[nn.Module],
        cell: nn.Module,
        x: Tensor,
        trial: Trial,
        build: Callable[[], nn.Module],
        kept: bool = True,
    ) -> None:
        """Add the cell of a group; ``x`` are the rows on which it was tried."""
        name = f"{type(layer_of(group)).__name__} {len(self.recipes)}"
        recipe = _recipe(name, cell, x, trial, build)
        size = sum(value.nbytes for _, value in named_tensors(cell)) if kept else 0
        ties = self._ties.of(len(self.recipes), cell)
        self.recipes.append(replace(recipe, tied=ties, kept_bytes=size, made_of=_classes(group)))
        width = self.rows[0][0].numel()
        self._ends_in_output = len(group) == 1 and not ties and is_output(cell, self._inputs.classes, width)
        self.rows = [trial.out]

    def recipes_of(self) -> Recipes:
        """What was collected, with the output layer apart.

        Raises:
            InputError: there are no modules.
        """
        if not self.recipes:
            raise InputError(f"net {self._spec!r}: has no modules; expected at least one")
        if self._ends_in_output and len(self.recipes) > 1:
            return Recipes(self.recipes[:-1], self.recipes[-1])
        return Recipes(self.recipes, None)


def _classes(group: Iterable[nn.Module]) -> str:
    return ", ".join(type(module).__name__ for module in group)


def _one(group: list[nn.Module]) -> nn.Module:
    return group[0] if len(group) == 1 else nn.Sequential(*group)


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


def _taken(
    spec: str,
    call: Callable[[], Iterable[Any]],
    number: int,
    classes: int | None,
    changes_input: bool,
    flattens: bool,
) -> nn.Module:
    """The cell of that number out of a fresh run of the generator."""
    module = _one(next(islice(grouped(_checked(spec, call()), classes), number, None)))
    if flattens:
        module.register_forward_pre_hook(_flattened)
    if changes_input:
        copy_inputs_of(module)
    return module


def _recipe(name: str, module: nn.Module, x: Tensor, trial: Trial, build: Callable[[], nn.Module]) -> CellRecipe:
    in_shape, out_shape = tuple(x.shape[1:]), tuple(trial.out.shape[1:])
    return _OwnCell(
        name=name,
        in_shape=in_shape,
        out_shape=out_shape,
        build=build,
        signature=("own", in_shape, out_shape, _signature(module)),
        draws=trial.draws,
        couples_batch=trial.couples_batch,
        needs_values=trial.needs_values,
        behaviour=trial.behaviour,
        channels_last=prefers_channels_last(module) and not trial.needs_contiguous,
        needs_contiguous=trial.needs_contiguous,
    )


def _signature(module: nn.Module) -> Hashable:
    """Names, shapes and kinds of a module's tensors, and what it says of itself."""
    tensors = tuple(
        (name, tuple(value.shape), str(value.dtype), value.requires_grad) for name, value in named_tensors(module)
    )
    modes = tuple(part.training for part in module.modules())
    return tensors, modes, _ADDRESS.sub("", repr(module))

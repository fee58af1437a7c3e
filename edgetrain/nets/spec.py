"""A net by its spec: ``FAMILY:SHAPE;option=value;...`` or ``path/to/net.py:function``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from edgetrain.errors import InputError
from edgetrain.nets import cnn, mlp, own
from edgetrain.nets.base import CellRecipe, Net, Options
from edgetrain.nets.layers import STANDARD, check_options

Cells = Callable[[str, tuple[int, ...], Options], Sequence[CellRecipe]]

NETS: dict[str, Cells] = {"mlp": mlp.cells, "cnn": cnn.cells}
EXAMPLES = {"mlp": mlp.EXAMPLE, "cnn": cnn.EXAMPLE}


def open_net(net: Any, in_shape: tuple[int, ...], preferred: Mapping[str, str]) -> Net:
    """A net for samples of ``in_shape``.

    Args:
        net: a spec, or in Python a function, an ``nn.Sequential`` or a list of modules.
        in_shape: of one sample of the data set.
        preferred: the method's options, used where the spec says nothing.

    Raises:
        InputError: the spec cannot be read or does not fit the data.
    """
    if isinstance(net, str):
        return _from_spec(net, in_shape, preferred)
    if isinstance(net, Iterable):
        modules = list(net)
        return Net("modules", own.cells("modules", own.given(_checked(modules)), in_shape), {**STANDARD, **preferred})
    if isinstance(net, nn.Module):
        raise InputError(f"net: a single {type(net).__name__} is no chain of cells; give a list or an nn.Sequential")
    if callable(net):
        name = getattr(net, "__name__", "function")
        return Net(name, own.cells(name, net, in_shape), {**STANDARD, **preferred})
    raise InputError(f"net {net!r}: expected a spec such as {mlp.EXAMPLE}, a function, or modules")


def _checked(modules: Sequence[Any]) -> Sequence[nn.Module]:
    for module in modules:
        if not isinstance(module, nn.Module):
            raise InputError(f"net: gave a {type(module).__name__}; expected nn.Modules")
    return modules


def _from_spec(spec: str, in_shape: tuple[int, ...], preferred: Mapping[str, str]) -> Net:
    shape, *settings = spec.split(";")
    family, _, text = shape.partition(":")
    options = {**STANDARD, **preferred}
    if family in NETS:
        options.update(_options(spec, settings))
        check_options(spec, options)
        return Net(spec, NETS[family](text, in_shape, options), options)
    if family.endswith(".py"):
        if settings:
            raise InputError(f"net {spec!r}: options are for built-in nets; your function decides for itself")
        return Net(spec, own.cells(spec, own.load_function(spec), in_shape), options)
    known = ", ".join(EXAMPLES.values())
    raise InputError(f"unknown net {spec!r}; expected {known}, or path/to/net.py:function")


def _options(spec: str, settings: Sequence[str]) -> dict[str, str]:
    options = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            raise InputError(f"net {spec!r}: option {setting!r}; expected option=value")
        options[key.strip()] = value.strip()
    return options

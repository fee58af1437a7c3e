"""A net by its spec: ``FAMILY:SHAPE;option=value;...`` or ``path/to/net.py:function``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from edgetrain.errors import InputError
from edgetrain.nets import cnn, embedding, lcmlp, mlp, own, vgg, vit
from edgetrain.nets.base import CellRecipe, Net, Options
from edgetrain.nets.layers import STANDARD, check_options
from edgetrain.plugins import Registry

Cells = Callable[[str, tuple[int, ...], Options], Sequence[CellRecipe]]
_DENSE = frozenset({"bias", "norm", "prenorm", "act", "dropout"})
_IMAGES = _DENSE | {"pool", "odd"}


@dataclass(frozen=True)
class Family:
    """Nets that are named alike, ``FAMILY:SHAPE;option=value``.

    Attributes:
        cells: makes the recipes, of the text before the options, the shape of one sample and the options.
        example: a spec of the family, for messages.
        options: that the family reads; others are refused where the user states them.
        summary: what the nets are, in a line.
        standard: of the options, those that differ from the other families', used where neither the method nor the
            spec says anything.
    """

    cells: Cells
    example: str
    options: frozenset[str] = _IMAGES
    summary: str = ""
    standard: Mapping[str, str] = field(default_factory=dict)


NETS: Registry[Family] = Registry(
    "edgetrain.nets",
    "net",
    {
        "mlp": Family(mlp.cells, "mlp:1000x2", _DENSE, "dense layers"),
        "cnn": Family(cnn.cells, cnn.EXAMPLE, summary="convolutional layers, each with pooling"),
        "lcmlp": Family(lcmlp.cells, lcmlp.EXAMPLE, _DENSE, "locally connected layers, by patch side"),
        **{
            family: Family(partial(vgg.cells, family), family, summary=f"the VGG net {family}")
            for family in vgg.FAMILIES
        },
        "vit": Family(
            vit.cells, vit.EXAMPLE, frozenset({"bias", "dropout", "tokens"}), "a vision transformer", vit.STANDARD
        ),
    },
)


def open_net(
    net: Any,
    in_shape: tuple[int, ...],
    preferred: Mapping[str, str],
    vocabulary: int | None = None,
    seed: int = 0,
    reads: tuple[int, ...] | None = None,
    classes: int | None = None,
) -> Net:
    """A net for samples of ``in_shape``.

    Args:
        net: a spec, or in Python a function, an ``nn.Sequential`` or a list of modules.
        in_shape: of one sample of the data set.
        preferred: the method's options, used where the spec says nothing.
        vocabulary: how many token ids there are, if the rows are token ids (int64 [B, L], 0 is padding).
        seed: of the run; a user's function is called under it.
        reads: shape of one sample that the first cell reads, if the method makes another one of it; a user's net
            may read either.
        classes: number of classes. In a user's net, a final ``nn.Linear`` with this many outputs is the output layer.

    Raises:
        InputError: the spec cannot be read or does not fit the data.
    """
    inputs, options = own.Inputs(in_shape, vocabulary, reads or in_shape, classes), {**STANDARD, **preferred}
    if isinstance(net, str):
        return _from_spec(net, inputs, preferred, seed)
    if isinstance(net, Iterable):
        return _own("modules", own.given("modules", net, inputs, seed), options)
    if isinstance(net, nn.Module):
        raise InputError(f"net: a single {type(net).__name__} is not a chain of cells; pass a list or an nn.Sequential")
    if callable(net):
        name = getattr(net, "__name__", "function")
        return _own(name, own.cells(name, net, inputs, seed), options)
    raise InputError(f"net {net!r}: expected a spec such as {mlp.EXAMPLE}, a function, or modules")


def _own(name: str, recipes: own.Recipes, options: Options) -> Net:
    return Net(name, recipes.cells, options, recipes.output)


def _examples() -> list[str]:
    """A spec of each of our own families, and the names of those of installed packages."""
    return [NETS[family].example if NETS.is_ours(family) else family for family in NETS]


def _from_spec(spec: str, inputs: own.Inputs, preferred: Mapping[str, str], seed: int) -> Net:
    shape, *settings = spec.split(";")
    family = shape.partition(":")[0]
    if family in NETS:
        stated = _options(spec, settings)
        options = {**STANDARD, **NETS[family].standard, **preferred, **stated}
        check_options(spec, options)
        _check_meaning(spec, family, stated, inputs.vocabulary)
        return Net(spec, _cells(spec, inputs.reads, options, inputs.vocabulary), options)
    if family.endswith(".py"):
        if settings:
            raise InputError(f"net {spec!r}: options are for built-in nets; your function decides for itself")
        return _own(spec, own.cells(spec, own.load_function(spec), inputs, seed), {**STANDARD, **preferred})
    raise InputError(f"unknown net {spec!r}; expected {', '.join(_examples())}, or path/to/net.py:function")


def _cells(spec: str, in_shape: tuple[int, ...], options: Options, vocabulary: int | None) -> Sequence[CellRecipe]:
    family, _, text = spec.split(";")[0].partition(":")
    if vocabulary is None:
        return NETS[family].cells(text, in_shape, options)
    if family != "mlp":
        raise InputError(f"net {spec!r} needs images; the data have rows of token ids: use mlp:")
    embed = embedding.cell(in_shape, vocabulary, options)
    return [embed, *mlp.cells(text, embed.out_shape, options, first=1)]


def _check_meaning(spec: str, family: str, stated: Options, vocabulary: int | None) -> None:
    """Refuse options that the family would ignore."""
    for key in stated:
        known = key == "embedding" and vocabulary is not None
        if not known and key not in NETS[family].options:
            raise InputError(f"net {spec!r}: option {key} has no meaning for {family} nets on these data")


def _options(spec: str, settings: Sequence[str]) -> dict[str, str]:
    options = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            raise InputError(f"net {spec!r}: option {setting!r}; expected option=value")
        options[key.strip()] = value.strip()
    return options

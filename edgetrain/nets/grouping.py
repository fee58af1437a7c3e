"""Which modules of a user's net form a cell.

A cell starts with a layer that learns. Activations, normalisation, pooling, dropout and other modules without
parameters belong to the layer before them, leading ones and ``nn.Flatten`` to the layer after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_SOFTMAX = (nn.Softmax, nn.LogSoftmax)
_NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_WITH_PARAMETERS = (*_NORMALISATION, nn.PReLU)
_RESHAPING = (nn.Flatten, nn.Unflatten)


def grouped(modules: Iterable[nn.Module], classes: int | None = None) -> Iterator[list[nn.Module]]:
    """The modules of each cell, in order; a net without any layer is one cell.

    Args:
        modules: the net.
        classes: number of classes. A final ``nn.Linear`` with this many outputs forms a group of its own, and a
            softmax after it is dropped. ``None``: the net has no output layer.
    """
    before: list[nn.Module] = []
    last: list[nn.Module] = []
    for group in _groups(_with_output_apart(modules, classes)):
        if before:
            yield before
        before, last = last, group
    if before and last and _has_outputs(last[-1], classes):
        before, last = [*before, *last[:-1]], last[-1:]
    yield from (group for group in (before, last) if group)


def _groups(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    group: list[nn.Module] = []
    following: list[nn.Module] = []  # for the next layer, or for this group where there is none
    has_layer = False
    for module in modules:
        if is_layer(module):
            if has_layer:
                yield group
                group = []
            group, following, has_layer = [*group, *following, module], [], True
        elif following or isinstance(module, _RESHAPING):
            following.append(module)
        else:
            group.append(module)
    if group or following:
        yield [*group, *following]


def is_layer(module: nn.Module) -> bool:
    """Whether a module learns more than a normalisation or an activation does."""
    children = list(module.children())
    if isinstance(module, _WITH_PARAMETERS):
        return False
    if any(True for _ in module.parameters(recurse=False)):
        return True
    return any(is_layer(child) for child in children)


def _with_output_apart(modules: Iterable[nn.Module], classes: int | None) -> Iterator[nn.Module]:
    """The same modules, with a final ``nn.Sequential`` that ends in an output layer split in two."""
    held: list[nn.Module] = []  # a module, and a softmax after it
    for module in modules:
        if held and not isinstance(module, _SOFTMAX):
            yield from held
            held = []
        held.append(module)
    if held:
        yield from _split(held[0], classes) or held


def is_output(module: nn.Module, classes: int | None, width: int) -> bool:
    """Whether a module maps ``width`` numbers to one for each class."""
    return _has_outputs(module, classes) and module.in_features == width


def _has_outputs(module: nn.Module, classes: int | None) -> TypeGuard[nn.Linear]:
    return isinstance(module, nn.Linear) and module.out_features == classes


def _split(module: nn.Module, classes: int | None) -> list[nn.Module]:
    """The module's parts, the last of which is an output layer; empty if it has none."""
    if _has_outputs(module, classes):
        return [module]
    if type(module) is not nn.Sequential or module._forward_hooks or module._forward_pre_hooks:
        return []
    *rest, last = list(_with_output_apart(module, classes)) or [module]
    if not _has_outputs(last, classes):
        return []
    return [nn.Sequential(*rest), last] if rest else [last]


def layer_of(group: list[nn.Module]) -> nn.Module:
    """The module that gives a cell its name."""
    return next((module for module in group if is_layer(module)), group[0])

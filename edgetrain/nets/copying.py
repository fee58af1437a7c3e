"""Copies of modules in which every parameter and buffer is another tensor.

``copy.deepcopy`` alone drops gradient hooks, fails on derived tensors (a pruned weight), and copies values
that are about to be replaced. Here everything that a module holds keeps pointing at the right tensor: tied
weights stay tied, an ``nn.LSTM`` finds its flat weights, ``requires_grad`` and gradient hooks stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(qualified name, tensor) of every parameter and buffer, each tensor once, under its first name."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{leaf}" if path else leaf, tensor


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Qualified names of the buffers that are not in the state dict (``persistent=False``)."""
    return {
        f"{path}.{leaf}" if path else leaf
        for path, owner in module.named_modules()
        for leaf in owner._non_persistent_buffers_set
    }


def with_tensors(module: M, make: Callable[[str, Tensor], Tensor]) -> M:
    """A copy of ``module`` whose parameters and buffers are those that ``make`` returns.

    Args:
        module: stays as it is.
        make: given the qualified name and the tensor, returns the one for the copy: any device, same shape.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(module):
        value = make(name, tensor)
        memo[id(tensor)] = _parameter(tensor, value) if isinstance(tensor, nn.Parameter) else value
    for tensor in loose_tensors(module):
        # Derived tensors are computed anew when the module runs; constants are shared.
        memo.setdefault(id(tensor), tensor if tensor.is_leaf else tensor.detach())
    return deepcopy(module, memo)


def cloned(module: M) -> M:
    """A copy with the same values on the same devices."""
    return with_tensors(module, lambda name, tensor: tensor.detach().clone())


def on_host(module: M) -> M:
    """A copy with the same values on the CPU."""
    return with_tensors(module, lambda name, tensor: tensor.detach().to("cpu", copy=True))


def on_meta(module: M) -> M:
    """A copy without values, on the meta device."""
    return with_tensors(module, lambda name, tensor: torch.empty_like(tensor, device="meta"))


def loose_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Tensors in a module's attributes that are neither its parameters nor its buffers."""
    for part in module.modules():
        for value in plain_attributes(part).values():
            yield from (found for found in _leaves(value) if isinstance(found, Tensor))


def unregistered_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(attribute, module) of modules that PyTorch does not see, such as those in a plain list."""
    known = set(module.modules())
    for path, part in module.named_modules():
        for name, value in plain_attributes(part).items():
            for found in _leaves(value):
                if isinstance(found, nn.Module) and found not in known:
                    yield f"{path}.{name}" if path else name, found


_BARE_MODULE = frozenset(vars(nn.Module()))


def plain_attributes(part: nn.Module) -> dict[str, Any]:
    """A module's own attributes, apart from those of every ``nn.Module``."""
    return {name: value for name, value in vars(part).items() if name not in _BARE_MODULE}


def _leaves(value: Any, depth: int = 3) -> Iterator[Any]:
    """The values in nested lists, tuples and dictionaries."""
    if depth and isinstance(value, (list, tuple, dict)):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for each in inner:
            yield from _leaves(each, depth - 1)
    else:
        yield value


def _parameter(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for hook in (old._backward_hooks or {}).values():
        new.register_hook(hook)  # type: ignore[no-untyped-call]
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        new.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return new


def gradient_hooks(module: nn.Module) -> list[tuple[nn.Parameter, Callable[[Tensor], Any]]]:
    """Each parameter's gradient hooks."""
    return [(value, hook) for value in module.parameters() for hook in (value._backward_hooks or {}).values()]


def kept_in_eval(module: nn.Module) -> list[nn.Module]:
    """The parts that are in evaluation mode and frozen, which training leaves so (batch norm, dropout)."""
    found = []
    for root in module.modules():
        learned = [value.requires_grad for value in root.parameters()]
        if learned and not any(learned):
            found += [part for part in root.modules() if not part.training]
    return list(dict.fromkeys(found))


def set_training(module: nn.Module, training: bool, frozen: list[nn.Module]) -> None:
    """Set the mode; parts that are ``frozen`` stay in evaluation mode (see ``kept_in_eval``)."""
    module.train(training)
    for part in frozen:
        part.training = False

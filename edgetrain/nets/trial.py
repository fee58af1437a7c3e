"""A user's module, tried on a few rows before anything is planned.

What a module does cannot be read off its class. So it runs for real, on the host, on copies: its output's
shape, whether the samples of a batch influence each other, whether it changes its input or itself, and
whether it can run on fake tensors, which hold no values (the planner's dry run).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from edgetrain.errors import InputError
from edgetrain.keys import derive
from edgetrain.nets.copying import (
    cloned,
    gradient_hooks,
    kept_in_eval,
    loose_tensors,
    named_tensors,
    plain_attributes,
    set_training,
    unregistered_modules,
    unsaved_buffers,
    with_tensors,
)
from edgetrain.nets.memory_format import convolution_weights, to_channels_last

ROWS = 6  # of a trial: pairs A, B and C; batches are A + B and A + C
_PAIR, _BATCH = 2, 4
_SEEDS = (1, 2)
_SAME = {"rtol": 1e-5, "atol": 1e-6}  # rows of equal batches
_ALIKE = {"rtol": 1e-3, "atol": 1e-5}  # batches of other sizes: kernels sum in another order
_PROBED = 4  # numbers of each row that tell a module's behaviour


@dataclass(frozen=True)
class Trial:
    """What running a module told.

    Attributes:
        out: output for the trial's rows in evaluation mode, float32 [ROWS, ...].
        couples_batch: whether the samples of a batch influence each other, or a batch cannot be split for
            another reason.
        changes_input: whether it changes its input in place, and therefore gets a copy of it.
        needs_values: whether it fails on fake tensors, which have shapes but no values.
        behaviour: numbers of its output with fixed weights on fixed rows; empty if they are not
            finite.
        needs_contiguous: whether it fails, or computes something else, on images in channels-last order.
        draws: whether it draws random numbers when it runs, or may: that is unknown of a user's own code.
    """

    out: Tensor
    couples_batch: bool
    changes_input: bool
    needs_values: bool
    behaviour: tuple[float, ...]
    needs_contiguous: bool = False
    draws: bool = True


def try_module(module: nn.Module, x: Tensor, name: str) -> Trial:
    """Run a module on ``x``, [ROWS, ...].

    A module that changes its input in place is given a copy of it from now on, by a forward pre-hook.

    Args:
        module: on the host; apart from that hook it stays as it is.
        x: float32, or int64 token ids.
        name: of the module, for messages.

    Raises:
        InputError: it fails, does not return one floating-point tensor with a row for each sample, or holds state
            that would be lost when it leaves the device.
    """
    _check_state(module, name)
    with torch.random.fork_rng(devices=[]):
        if changes_input := _changes_input(module, x, name):
            copy_inputs_of(module)
        out = _evaluated(module, x, name)
        _check_changes(module, x, name)
        couples = _couples_batch(module, x) or not _hooks_are_linear(module)
        fakes, behaviour = _runs_on_fakes(module, x), _behaviour(module, x)
        contiguous, draws = _needs_contiguous(module, x), _draws(module, x)
        return Trial(out, couples, changes_input, not fakes, behaviour, contiguous, draws)


def copy_inputs_of(module: nn.Module) -> None:
    """Give a module copies of its inputs from now on."""
    module.register_forward_pre_hook(_copies)


def _copies(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _changes_input(module: nn.Module, x: Tensor, name: str) -> bool:
    """Whether it changes its input in place, in either mode."""
    for training in (True, False):
        given = x.clone()
        before = given._version
        _ran(_copy(module, training), given, name)
        if given._version != before:
            return True
    return False


def _evaluated(module: nn.Module, x: Tensor, name: str) -> Tensor:
    """The output in evaluation mode."""
    out = _ran(_copy(module, training=False), x, name)
    if not isinstance(out, Tensor) or out.ndim < 2 or out.shape[0] != len(x):
        raise InputError(
            f"{name} must return one tensor [B, ...] with a row for each sample; for {len(x)} samples it returned"
            f" {_described(out)}"
        )
    if not out.is_floating_point():
        raise InputError(
            f"{name} must return floating-point numbers; it returned {_dtype(out)} for rows of {_dtype(x)}"
        )
    return out.clone()


def _ran(copy: nn.Module, x: Tensor, name: str) -> Any:
    try:
        with torch.no_grad():
            return copy(x)
    except Exception as error:
        raise InputError(f"{name} fails on rows of shape {tuple(x.shape[1:])} ({_dtype(x)}): {said(error)}") from error


def _copy(module: nn.Module, training: bool) -> nn.Module:
    copy = cloned(module)
    set_training(copy, training, kept_in_eval(copy))
    return copy


def _check_state(module: nn.Module, name: str) -> None:
    """Refuse what a module holds that would be neither trained nor saved."""
    for attribute, found in unregistered_modules(module):
        raise InputError(
            f"{name}: self.{attribute} holds a {type(found).__name__} that PyTorch does not register, so it would be"
            " neither trained nor saved; use nn.ModuleList or nn.ModuleDict"
        )
    registered = {id(value) for _, value in named_tensors(module)}
    if any(isinstance(value, nn.Parameter) and id(value) not in registered for value in loose_tensors(module)):
        raise InputError(
            f"{name} holds an nn.Parameter that PyTorch does not register (in a list or dict), so it would be neither"
            " trained nor saved; use nn.ParameterList or nn.ParameterDict"
        )
    for path, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise InputError(
                f"{name}: {path or type(part).__name__} saves state by get_extra_state, which is not stored with a"
                " cell; keep it in buffers (register_buffer)"
            )


def check_memory(module: nn.Module, name: str) -> None:
    """Refuse two tensors in one memory: copies of them would no longer change together.

    Raises:
        InputError: there are such tensors.
    """
    ranges = [(key, _range(value)) for key, value in named_tensors(module) if not is_lazy(value) and value.numel()]
    for (one, a), (other, b) in combinations(ranges, 2):
        if a[0] == b[0] and a[1] < b[2] and b[1] < a[2]:
            raise InputError(
                f"{name}: {one} and {other} share memory but are two tensors, so training one would no longer change"
                " the other; use one nn.Parameter for both, or clone() one of them"
            )


def _range(value: Tensor) -> tuple[int, int, int]:
    """The storage's address, and the bytes of it from and to which a tensor reaches."""
    first = value.storage_offset() * value.element_size()
    reach = sum(int(n - 1) * int(step) for n, step in zip(value.shape, value.stride(), strict=True)) + 1
    return value.untyped_storage().data_ptr(), int(first), int(first) + reach * value.element_size()


def _check_changes(module: nn.Module, x: Tensor, name: str) -> None:
    """Refuse a module that keeps state between batches anywhere but in its parameters and saved buffers."""
    copy = _copy(module, training=True)
    before, unsaved = attributes(copy), unsaved_buffers(copy)
    kept = {key: value.clone() for key, value in named_tensors(copy) if key in unsaved}
    for part in copy.modules():
        for key, value in list(plain_attributes(part).items()):
            if isinstance(value, Tensor) and value.is_leaf:  # otherwise shared with the module
                setattr(part, key, value.clone())
    with torch.no_grad():
        copy(x.clone())
    after = attributes(copy)
    for key in [*before, *(key for key in after if key not in before)]:
        if before.get(key) != after.get(key):
            raise InputError(
                f"{name}: self.{key} changes when it runs in training mode, and would be lost when the cell leaves the"
                " device; keep it in a buffer (register_buffer)"
            )
    for key, value in named_tensors(copy):
        if key in kept and not torch.equal(value, kept[key]):
            raise InputError(
                f"{name}: buffer {key} changes in training mode but is not saved (persistent=False); register it with"
                " persistent=True"
            )


def attributes(module: nn.Module) -> dict[str, object]:
    """Values of the plain attributes of all parts, of those kinds that can hold state between batches."""
    return {
        f"{path}.{key}" if path else key: _value(value)
        for path, part in module.named_modules()
        for key, value in plain_attributes(part).items()
        if _value(value) is not None
    }


def _value(value: Any) -> object:
    """What to compare of an attribute; ``None`` for what is computed anew (activations, derived weights)."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        small = value.is_leaf and value.numel() <= 1 << 20
        return (tuple(value.shape), value.detach().double().flatten().tolist()) if small else None
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, (list, tuple)):
        return [_value(each) for each in value] or None
    if isinstance(value, dict):
        return [(str(key), _value(each)) for key, each in value.items()] or None
    return None


@dataclass(frozen=True)
class _Pass:
    """Outputs [B, ...], gradients of the inputs [B, ...] (``None``: there are none) and of the parameters."""

    out: Tensor
    slopes: Tensor | None
    gradients: list[Tensor]


def _pass(module: nn.Module, x: Tensor, seed: int) -> _Pass:
    """Forward and backward pass of a batch, with all random numbers from ``seed``."""
    _seed_everything(seed)
    given = x.clone().requires_grad_(x.is_floating_point())
    out = module(given * 1 if given.requires_grad else given)
    learned = [value for value in module.parameters() if value.requires_grad]
    wanted = ([given] if given.requires_grad else []) + learned
    if not (out.requires_grad and wanted):
        return _Pass(out.detach(), None, [])
    weights = torch.linspace(-1, 2, out[0].numel()).view_as(out[0])
    found = torch.autograd.grad((out.square() * weights).sum(), wanted, allow_unused=True)
    slopes = found[0] if given.requires_grad else None
    gradients = [value for value in found[len(wanted) - len(learned) :] if value is not None]
    return _Pass(out.detach(), slopes, gradients)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a user's module may draw from it)
    random.seed(seed)


def _couples_batch(module: nn.Module, x: Tensor) -> bool:
    """Whether other rows 3 and 4 change what becomes of rows 1 and 2, or 4 rows differ from 2 + 2."""
    a, b, c = torch.split(x, _PAIR)
    one = _pass(_copy(module, True), torch.cat([a, b]), _SEEDS[0])
    other = _pass(_copy(module, True), torch.cat([a, c]), _SEEDS[0])
    if not _close(one.out[:_PAIR], other.out[:_PAIR], _SAME):
        return True
    paired = one.slopes is not None and other.slopes is not None
    if paired and not _close(one.slopes[:_PAIR], other.slopes[:_PAIR], _SAME):  # type: ignore[index]
        return True
    return _depends_on_size(module, a, b)


def _depends_on_size(module: nn.Module, a: Tensor, b: Tensor) -> bool:
    """Whether a batch of 4 differs from 2 + 2, with everything that draws random numbers switched off."""
    make = _deterministic(module, torch.cat([a, b]))
    if make is None:
        return False
    whole, parts = make(), make()
    try:
        one = _pass(whole, torch.cat([a, b]), _SEEDS[0])
        first, second = _pass(parts, a, _SEEDS[0]), _pass(parts, b, _SEEDS[0])
    except Exception:  # it needs its batches whole
        return True
    if not _close(one.out, torch.cat([first.out, second.out]), _ALIKE):
        return True
    sums = [x + y for x, y in zip(first.gradients, second.gradients, strict=True)]
    buffers = (dict(module.named_buffers()) for module in (whole, parts))
    pairs = [*zip(one.gradients, sums, strict=True), *zip(*(each.values() for each in buffers), strict=True)]
    return not all(_close(x, y, _ALIKE) for x, y in pairs)


def _draws(module: nn.Module, x: Tensor) -> bool:
    """Whether a module draws random numbers; a user's own code may do so at any time."""
    for part in module.modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if not type(part).__module__.startswith("torch.nn.") or any(
            not getattr(hook, "__module__", "").startswith("edgetrain.") for hook in hooks
        ):
            return True
    _seed_everything(_SEEDS[0])
    before = torch.random.get_rng_state()
    _pass(_copy(module, True), x[:_BATCH], _SEEDS[0])
    return not torch.equal(before, torch.random.get_rng_state())


def _needs_contiguous(module: nn.Module, x: Tensor) -> bool:
    """Whether a module fails, or computes something else, on images in channels-last order."""
    if x.ndim != 4:
        return False
    batch = x[:_BATCH]
    same_draws = _deterministic(module, batch)
    make = same_draws or partial(_copy, module, True)
    plain, other = make(), make()
    weights = convolution_weights(other)
    other = with_tensors(other, lambda _, own: to_channels_last(own.detach()) if id(own) in weights else own.detach())
    try:
        one, two = _pass(plain, batch, _SEEDS[0]), _pass(other, to_channels_last(batch), _SEEDS[0])
    except Exception:
        return True
    # Gradients of equal modules may differ by far more: batch normalisation cancels, activations have kinks.
    return same_draws is not None and not _close(one.out, two.out, _ALIKE)


def _deterministic(module: nn.Module, x: Tensor) -> Callable[[], nn.Module] | None:
    """Makes copies that draw no random numbers: in training mode, without dropout, or in evaluation mode."""

    def training() -> nn.Module:
        return _copy(module, True)

    def without_dropout() -> nn.Module:
        copy = _copy(module, True)
        for part in copy.modules():
            if isinstance(part, _DropoutNd):
                part.training = False
        return copy

    def evaluating() -> nn.Module:
        return _copy(module, False)

    for make in (training, without_dropout, evaluating):
        one, other = (_pass(make(), x, seed).out for seed in _SEEDS)
        if torch.equal(one, other):
            return make
    return None


def _close(one: Tensor, other: Tensor, tolerance: dict[str, float]) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    scale = max(float(one.abs().max()) if one.numel() else 0.0, 1.0)
    return torch.allclose(one, other, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale, equal_nan=True)


def _hooks_are_linear(module: nn.Module) -> bool:
    """Whether gradient hooks give the same for a sum of gradients as for each: masks do, clipping does not."""
    for value, hook in gradient_hooks(module):
        g, h = torch.randn_like(value), 3 * torch.randn_like(value)
        try:
            found = [hook(each.clone()) for each in (g, h, g + h)]
        except Exception:
            return False
        if any(each is None for each in found):
            continue
        if not _close(found[0] + found[1], found[2], _ALIKE):
            return False
    return True


def _runs_on_fakes(module: nn.Module, x: Tensor) -> bool:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            copy = with_tensors(module, lambda name, tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            for training in (True, False):
                set_training(copy, training, kept_in_eval(copy))
                given = torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.is_floating_point())
                out = copy(given * 1 if given.requires_grad else given)
                if out.requires_grad:
                    out.sum().backward()
    except Exception:
        return False
    return True


def _behaviour(module: nn.Module, x: Tensor) -> tuple[float, ...]:
    """What the module computes, whatever its weights: outputs in evaluation mode with keyed weights, on keyed rows."""
    unsaved = unsaved_buffers(module)

    def fixed(name: str, tensor: Tensor) -> Tensor:
        if name in unsaved:
            return tensor.detach().clone()
        if not isinstance(tensor, nn.Parameter):
            return torch.ones_like(tensor) if tensor.is_floating_point() else torch.zeros_like(tensor)
        draw = np.random.Generator(np.random.Philox(derive(0, "behaviour", name)))
        std = max(tensor[0].numel() if tensor.ndim > 1 else 1, 1) ** -0.5
        return torch.from_numpy(draw.standard_normal(tuple(tensor.shape)) * std).to(tensor.dtype)

    draw = np.random.Generator(np.random.Philox(derive(0, "behaviour")))
    shape = (_PAIR, *x.shape[1:])
    most = int(x.max()) + 1 if not x.is_floating_point() else 1
    rows = torch.from_numpy(draw.standard_normal(shape) if x.is_floating_point() else draw.integers(0, most, shape))
    copy = with_tensors(module, fixed).eval()
    _seed_everything(_SEEDS[0])
    try:
        with torch.no_grad():
            out = copy(rows.to(x.dtype)).flatten(1).double()
    except Exception:  # the fixed weights may be none that it takes
        return ()
    found = torch.cat([out[:, :_PROBED].flatten(), out.mean(1), out.std(1, unbiased=False)])
    return tuple(float(f"{value:.9g}") for value in found.tolist()) if bool(found.isfinite().all()) else ()


def same_behaviour(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two modules compute the same, as far as their trials tell."""
    if not one or not other:
        return True
    return len(one) == len(other) and bool(np.allclose(one, other, rtol=1e-3, atol=1e-4))


def said(error: Exception) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _described(out: Any) -> str:
    return f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")

"""The state of the process that a run depends on: taken for the run, and given back as it was.

PyTorch's random generators, thread count and modes belong to the whole process, so one run at a time may have
them: runs in several threads wait for each other.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from edgetrain.config import Settings
from edgetrain.memory import device as devices
from edgetrain.memory.threads import fixed_team_size

_LOCK = threading.RLock()
_DENORMAL = 1e-40  # in float32


@contextmanager
def process_state(settings: Settings) -> Iterator[None]:
    """A scope for all work of a run: the torch defaults that its bits depend on, whatever the caller's are.

    Gradients are on; autocast, inference mode, anomaly detection and dispatch modes are off; the default dtype is
    float32 and the default device the CPU; products are in full precision. Denormal numbers count as zero: where a cell
    has learned its rows, the squares of its gradients are such numbers, and a step takes two to four times as long.
    Random generators are where they were when the scope ends.
    """
    with _LOCK, ExitStack() as stack:
        devices.configure_cuda()
        _keep_generators(stack)
        deterministic = devices.is_cuda(settings.device)
        settings_of_torch: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = [
            (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
            (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
            (torch.get_num_threads, torch.set_num_threads, settings.threads or torch.get_num_threads()),
            (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False),
            (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, deterministic),
            *_cudnn_settings(),
            (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, True),
            (_flushes_denormals, torch.set_flush_denormal, True),
        ]
        for get, put, value in settings_of_torch:
            _set(stack, get, put, value)
        if _get_current_dispatch_mode_stack():
            stack.enter_context(_disable_current_modes())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        stack.enter_context(fixed_team_size())
        yield


def described(device: str) -> dict[str, Any]:
    """What of torch the bits of a run depend on beside its settings, for its ``config.toml``."""
    about: dict[str, Any] = {"version": torch.__version__}
    if devices.is_cuda(device):
        about |= {"deterministic": True, "cudnn_benchmark": False, "tf32": False}
    return about


def _set(stack: ExitStack, get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> None:
    """Set a global of torch until the stack is closed."""
    before = get()
    if before != value:
        stack.callback(put, before)
        put(value)


def _cudnn_settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any], Any]]:
    """CuDNN and TF32, whose defaults let bits depend on the free memory and on the generation of the GPU.

    Fixed by reading PyTorch's documentation; without a GPU nothing shows it.
    """
    for owner, name, value in (
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
    ):
        yield partial(getattr, owner, name), partial(setattr, owner, name), value


def _keep_generators(stack: ExitStack) -> None:
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 (a user's module may draw from it)
    stack.callback(torch.random.set_rng_state, torch.random.get_rng_state())
    if (put_back := devices.generator_states()) is not None:
        stack.callback(put_back)


def _flushes_denormals() -> bool:
    return bool((torch.tensor(_DENORMAL, dtype=torch.float32, device="cpu") * 1.0) == 0)

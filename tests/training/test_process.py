"""A run's bits do not depend on the state of its process, which it leaves as it was."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import edgetrain

NET = "mlp:16x2;dropout=0.3"
FAST = {"epochs": 2, "batch_size": 16, "threads": 1, "device": "cpu", "seed": 1}


def rows() -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    return draw.normal(size=(60, 8)).astype(np.float32), np.arange(60) % 3


def weights(run: edgetrain.Run) -> list[Tensor]:
    return list(run.cells().state_dict().values())


def fit(path: Path, net: Any = NET) -> list[Tensor]:
    return weights(edgetrain.fit(net, rows(), run_dir=path, **FAST))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@contextmanager
def changed(get: Any, put: Any, value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
        assert get() == value
    finally:
        put(before)


@contextmanager
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
        assert float(torch.tensor(1e-40) * 1) == 0
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def keeping() -> Iterator[None]:
    yield
    assert float(torch.tensor(1e-40) * 1) != 0


AMBIENT: dict[str, Any] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device": lambda: torch.device("meta"),
    "matmul precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "anomaly": lambda: changed(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, True),
    "other kernels": lambda: changed(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    "flush denormals": flushing,
    "keep denormals": keeping,
    "another mode": lambda: FlopCounterMode(display=False),
    "numpy errors": lambda: np.errstate(all="raise"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return fit(tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", list(AMBIENT))
def test_a_run_takes_a_known_state_and_restores_the_callers(kind: str, alone: list[Tensor], tmp_path: Path) -> None:
    ambient: AbstractContextManager[Any] = AMBIENT[kind]()
    with ambient:
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        run = edgetrain.fit(NET, rows(), run_dir=tmp_path / "run", **FAST)
        predicted = run.predict(rows()[0])
        assert before == (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
    assert same(weights(run), alone)
    assert np.array_equal(predicted, run.predict(rows()[0]))


class Noisy(nn.Module):
    """Draws from NumPy's and Python's generators, as some users' modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + torch.from_numpy(np.random.standard_normal(x.shape)).float() * random.random()  # noqa: NPY002
        return self.linear(x)


def test_generators_are_the_runs_and_then_the_callers_again(tmp_path: Path) -> None:
    found = []
    for start in (1, 2):
        random.seed(start)
        np.random.seed(start)  # noqa: NPY002
        torch.manual_seed(start)
        expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
        torch.manual_seed(0)
        net = [Noisy()]
        torch.manual_seed(start)
        found.append(fit(tmp_path / str(start), net))
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
        assert after == expected
    assert same(*found)


def test_runs_in_threads_do_not_change_each_other(alone: list[Tensor], tmp_path: Path) -> None:
    found: list[list[Tensor]] = []

    def work(number: int) -> None:
        found.append(fit(tmp_path / str(number)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(each, alone) for each in found)

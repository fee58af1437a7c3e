"""The devices' one face. CUDA is simulated unless a test is marked ``gpu``.

``pytest tests/memory/test_device.py``
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgetrain.errors import InputError
from edgetrain.memory import device as devices
from edgetrain.memory import facts
from edgetrain.units import MIB

CPU = torch.device("cpu")
MPS = torch.device("mps")
CUDA = torch.device("cuda", 0)
TOTAL = 4096 * MIB
FREE = 3000 * MIB


class FakeCuda:
    """Two simulated GPUs; what a test changes here, ``torch.cuda`` answers."""

    def __init__(self) -> None:
        self.properties = SimpleNamespace(
            total_memory=TOTAL, is_integrated=0, uuid="7c1f3b2a-0000-1111-2222-333344445555"
        )
        self.free_and_total = (FREE, TOTAL)
        self.reserved = 100 * MIB
        self.fractions: list[tuple[float, torch.device]] = []
        self.warmed: list[torch.device] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "device_count": lambda: 2,
            "get_device_properties": lambda device: self.properties,
            "get_device_name": lambda device: "Simulated GPU",
            "get_device_capability": lambda device: (8, 6),
            "mem_get_info": lambda device: self.free_and_total,
            "memory_reserved": lambda device: self.reserved,
            "set_per_process_memory_fraction": lambda part, device: self.fractions.append((part, device)),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(devices.Cuda, "warm_up", lambda own, device: self.warmed.append(device), raising=True)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Simulated CUDA: no GPU is touched."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


class FakeNvml:
    """A simulated ``pynvml`` that knows one process, ours."""

    class NVMLError(Exception):
        """Stands in for pynvml.NVMLError."""

    def __init__(self) -> None:
        self.processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=390 * MIB)]
        self.devices = 1
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.devices

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid.startswith("GPU-7c1f3b2a")
        return "handle"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        assert handle == "handle"
        return self.processes

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        raise self.NVMLError("Not Supported")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """Simulated NVML; checks that every nvmlInit was answered by an nvmlShutdown."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    yield fake
    assert fake.open == 0


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: a machine without a usable GPU, wherever the test runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def set_available(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=2 * TOTAL))


# --- which device -----------------------------------------------------------------------------


def test_importing_the_module_does_not_import_torch() -> None:
    code = "import sys; import edgetrain.memory.device; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("no_cuda")
def test_auto_is_the_cpu_without_cuda() -> None:
    assert devices.resolve("auto") == CPU
    assert devices.resolve(" CPU ") == CPU


def test_auto_is_the_first_gpu_with_cuda(cuda: FakeCuda) -> None:
    """Simulated CUDA."""
    assert devices.resolve("auto") == CUDA
    assert devices.resolve("cuda") == CUDA
    assert devices.resolve("cuda:1") == torch.device("cuda", 1)


def test_cuda_is_the_current_device_where_one_was_chosen(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated CUDA: somebody called torch.cuda.set_device(1)."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert devices.resolve("cuda") == torch.device("cuda", 1)


def test_an_index_that_is_not_there_is_refused(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated CUDA."""
    with pytest.raises(InputError, match=r"cuda:2: found cuda:0 to cuda:1; choose"):
        devices.resolve("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"cuda:1: only cuda:0 is there; choose"):
        devices.resolve("cuda:1")


@pytest.mark.parametrize("word", ["tpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "gpu"])
def test_an_unknown_word_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="unknown device; use auto, cuda, cuda:N, mps or cpu") as caught:
        devices.resolve(word)
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("no_cuda")
def test_missing_cuda_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the three ways in which CUDA can be missing."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="built without CUDA; install a CUDA build of torch, or use --device cpu"):
        devices.resolve("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(InputError, match=r"cuda:1: .*no usable GPU was found; check the driver, or use"):
        devices.resolve("cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=''; unset it, or use --device cpu") as caught:
        devices.resolve("cuda")
    assert "\n" not in str(caught.value)


def test_mps_comes_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, no_cuda: None) -> None:
    """Simulated: an Apple GPU, there and not there."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.resolve("auto") == CPU
    assert devices.resolve("mps") == MPS
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="no Apple GPU"):
        devices.resolve("mps")


# --- memory -----------------------------------------------------------------------------------


def test_a_discrete_gpu_answers_for_itself(cuda: FakeCuda) -> None:
    """Simulated CUDA."""
    assert not devices.is_integrated(CUDA)
    assert devices.free_bytes(CUDA) == FREE
    assert devices.total_bytes(CUDA) == TOTAL
    assert devices.default_budget(CUDA) == 2700 * MIB


def test_unified_memory_is_asked_of_the_system(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated Jetson: cudaMemGetInfo does not count page cache that could be had back."""
    cuda.properties.is_integrated = 1
    cuda.free_and_total = (200 * MIB, TOTAL)
    set_available(monkeypatch, 2000 * MIB)
    assert devices.is_integrated(CUDA)
    assert devices.free_bytes(CUDA) == 2000 * MIB
    assert devices.default_budget(CUDA) == 1200 * MIB  # the host's side has what is left of 90%
    set_available(monkeypatch, 2 * TOTAL)
    assert devices.free_bytes(CUDA) == TOTAL


def test_a_driver_that_does_not_say_is_unknown(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated CUDA whose driver refuses the query."""

    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert devices.free_bytes(CUDA) is None
    assert devices.default_budget(CUDA) is None


@pytest.mark.parametrize("device", [CPU, MPS])
def test_cpu_and_mps_have_the_machines_memory_and_no_budget(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_available(monkeypatch, 123 * MIB)
    assert devices.free_bytes(device) == 123 * MIB
    assert devices.total_bytes(device) == 2 * TOTAL
    assert devices.default_budget(device) is None
    assert devices.context_bytes(device) is None
    assert devices.is_integrated(device) is (device.type == "mps")


# --- the context ------------------------------------------------------------------------------


def test_the_context_is_what_nvml_sees_beyond_the_allocator(cuda: FakeCuda, nvml: FakeNvml) -> None:
    """Simulated CUDA and NVML."""
    nvml.processes.append(SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=900 * MIB))
    assert devices.context_bytes(CUDA) == 290 * MIB
    assert cuda.warmed == [CUDA]  # kernels and libraries are loaded when they are first used


def test_in_a_container_the_context_is_what_all_processes_hold_more(
    cuda: FakeCuda, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated CUDA and NVML, which knows this process by another id."""
    nvml.processes = [SimpleNamespace(pid=-1, usedGpuMemory=700 * MIB)]
    used = iter([500 * MIB, 950 * MIB])
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=next(used)))
    assert devices.context_bytes(CUDA) == 350 * MIB


@pytest.mark.parametrize(
    "processes",
    [
        [],
        [SimpleNamespace(pid=-1, usedGpuMemory=390 * MIB)],
        [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)],
        [SimpleNamespace(pid=os.getpid(), usedGpuMemory=0)],
        [SimpleNamespace(pid=os.getpid(), usedGpuMemory=100 * MIB)],
    ],
    ids=["nobody", "somebody else (container)", "not told (WSL)", "nothing", "no more than reserved"],
)
def test_a_context_that_cannot_be_known_is_unknown_not_zero(
    cuda: FakeCuda, nvml: FakeNvml, processes: list[SimpleNamespace]
) -> None:
    """Simulated CUDA and NVML."""
    nvml.processes = processes
    assert devices.context_bytes(CUDA) is None


@pytest.mark.parametrize("error", [FakeNvml.NVMLError("Not Supported"), OSError(), AttributeError()])
def test_an_nvml_that_fails_is_unknown(
    cuda: FakeCuda, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Simulated CUDA and NVML; the fixture checks that it is shut down all the same."""

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(nvml, "nvmlDeviceGetComputeRunningProcesses", fail)
    assert devices.context_bytes(CUDA) is None
    monkeypatch.setattr(nvml, "nvmlInit", fail)
    assert devices.context_bytes(CUDA) is None


def test_no_nvml_is_unknown(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated CUDA; the import of pynvml fails."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices.context_bytes(CUDA) is None


def test_without_a_uuid_only_a_sole_gpu_is_matched(cuda: FakeCuda, nvml: FakeNvml) -> None:
    """Simulated CUDA of an older torch, which tells no UUID."""
    del cuda.properties.uuid
    assert devices.context_bytes(CUDA) == 290 * MIB
    nvml.devices = 2
    assert devices.context_bytes(CUDA) is None


# --- limits and settings ----------------------------------------------------------------------


def test_the_cap_is_a_fraction_of_the_total(cuda: FakeCuda) -> None:
    """Simulated CUDA."""
    devices.cap(CUDA, TOTAL // 4)
    devices.cap(CUDA, 2 * TOTAL)
    devices.cap(CUDA, None)
    assert cuda.fractions == [(0.25, CUDA), (1.0, CUDA), (1.0, CUDA)]


def test_where_two_totals_differ_the_cap_stays_within_the_budget(cuda: FakeCuda) -> None:
    """Simulated CUDA: which total torch multiplies by depends on its version."""
    cuda.free_and_total = (FREE, 2 * TOTAL)
    devices.cap(CUDA, TOTAL)
    assert cuda.fractions == [(0.5, CUDA)]


@pytest.mark.parametrize("device", [CPU, MPS])
def test_the_cap_does_nothing_elsewhere(device: torch.device) -> None:
    devices.cap(device, 512 * MIB)
    devices.cap(device, None)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        devices.cap(CPU, budget)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_torch_turns_the_fraction_back_into_the_very_budget(budget: int, total: int) -> None:
    fraction = devices._fraction(budget, total)
    assert 0 < fraction <= 1
    assert int(fraction * float(total)) == min(budget, total)


def test_cublas_is_made_small_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    devices.configure_cuda()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLASLT_WORKSPACE_SIZE"] == "128"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    devices.configure_cuda()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("anything"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/C.cpp":995, please'), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("x INTERNAL ASSERT FAILED at y"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_out_of_memory_is_known_by_class_or_text(error: BaseException, expected: bool) -> None:
    assert devices.is_out_of_memory(error) is expected


def test_a_real_refusal_of_the_cpu_allocator_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert devices.is_out_of_memory(caught.value)


# --- for people -------------------------------------------------------------------------------


def test_the_description_has_the_same_keys_everywhere(cuda: FakeCuda, nvml: FakeNvml) -> None:
    """Simulated CUDA and NVML."""
    on_cpu, on_cuda = facts.describe(CPU), facts.describe(CUDA)
    assert on_cpu.keys() == on_cuda.keys()
    assert on_cpu["kind"] == "cpu"
    assert on_cpu["compute_capability"] is None
    expected: dict[str, Any] = {
        "kind": "cuda",
        "index": 0,
        "name": "Simulated GPU",
        "integrated": False,
        "total_mb": 4096.0,
        "free_mb": 3000.0,
        "default_budget_mb": 2700.0,
        "context_mb": 290.0,
        "driver_version": "550.54",
        "compute_capability": "8.6",
    }
    assert expected.items() <= on_cuda.items()


def test_the_processor_has_a_name() -> None:
    assert facts.name(CPU)


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC 7B13\n", "AMD EPYC 7B13"),
        (
            "proc/device-tree/model",
            "NVIDIA Jetson Orin Nano Developer Kit\0",
            "NVIDIA Jetson Orin Nano Developer Kit",
        ),
    ],
)
def test_the_processors_name_is_read_from_the_system(tmp_path: Path, path: str, text: str, expected: str) -> None:
    """Simulated system files."""
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert facts._processor_name(tmp_path) == expected


def test_a_jetsons_power_mode_is_read_from_nvpmodels_files(tmp_path: Path) -> None:
    """Simulated Jetson files."""
    assert facts.power_mode(tmp_path) is None
    status = tmp_path / "var/lib/nvpmodel/status"
    status.parent.mkdir(parents=True)
    status.write_text("pmode:0002\n")
    assert facts.power_mode(tmp_path) == "2"
    modes = tmp_path / "etc/nvpmodel.conf"
    modes.parent.mkdir()
    modes.write_text("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n")
    assert facts.power_mode(tmp_path) == "2 (MAXN_SUPER)"


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = devices.resolve("cuda")
    yield device
    devices.cap(device, None)


@pytest.mark.gpu
def test_a_real_gpu_has_memory_a_name_and_facts(gpu: torch.device) -> None:
    free, total = devices.free_bytes(gpu), devices.total_bytes(gpu)
    assert free is not None
    assert total is not None
    assert 0 < free <= total
    assert facts.name(gpu) == torch.cuda.get_device_name(gpu)
    assert facts.describe(gpu)["kind"] == "cuda"


@pytest.mark.gpu
def test_a_real_context_is_of_a_plausible_size(gpu: torch.device) -> None:
    held = torch.zeros(1, device=gpu)
    context = devices.context_bytes(gpu)
    del held
    if context is None:
        pytest.skip("NVML does not tell what this process holds")
    assert 50 * MIB < context < 3000 * MIB


@pytest.mark.gpu
def test_a_real_allocator_obeys_the_cap_to_the_byte(gpu: torch.device) -> None:
    torch.cuda.empty_cache()
    budget = torch.cuda.memory_reserved(gpu) + 64 * MIB
    devices.cap(gpu, budget)
    held = torch.empty(64 * MIB, dtype=torch.uint8, device=gpu)  # exactly fills it
    assert torch.cuda.memory_reserved(gpu) == budget
    with pytest.raises(RuntimeError) as caught:
        torch.empty(64 * MIB, dtype=torch.uint8, device=gpu)
    assert devices.is_out_of_memory(caught.value)
    del held
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_real_cublas_takes_128_kib(gpu: torch.device) -> None:
    """In a process of its own, as the variables are read once."""
    code = """
import torch
from edgetrain.memory import device
device.configure_cuda()
x = torch.ones(256, 256, device="cuda")
before = torch.cuda.memory_allocated()
y = x @ x
print(torch.cuda.memory_allocated() - before - y.numel() * 4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 128 * 1024

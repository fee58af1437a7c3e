"""Joules by the sensors of made-up machines. ``pytest tests/memory/test_energy.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edgetrain.memory import device as devices
from edgetrain.memory import nvml
from edgetrain.memory.energy import EnergyMeter, sensor_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def written(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def package(sysfs: Path, number: int, microjoules: int, name: str = "package-0", wrap: int = 1_000_000_000) -> Path:
    folder = sysfs / "class" / "powercap" / f"intel-rapl:{number}"
    return written(folder, name=name, energy_uj=microjoules, max_energy_range_uj=wrap)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_without_a_sensor_energy_is_unknown(tmp_path: Path) -> None:
    with EnergyMeter(CPU, tmp_path) as meter:
        assert meter.joules is None
        meter.restart()
    assert meter.joules is None
    assert meter.source is None


def test_packages_are_summed_up_and_their_parts_are_not_counted_twice(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 5_000_000), package(tmp_path, 1, 7_000_000, "package-1")
    written(tmp_path / "class" / "powercap" / "intel-rapl:0:0", name="core", energy_uj=1, max_energy_range_uj=2)
    package(tmp_path, 2, 1, "psys")
    with EnergyMeter(CPU, tmp_path) as meter:
        written(first, energy_uj=9_000_000)
        written(second, energy_uj=8_500_000)
        assert meter.joules == pytest.approx(5.5)
        meter.restart()
        assert meter.joules == 0
        written(first, energy_uj=10_000_000)
    assert meter.joules == pytest.approx(1.0)
    assert meter.source == "RAPL: the CPU"


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    folder = package(tmp_path, 0, 999_000_000)
    with EnergyMeter(CPU, tmp_path) as meter:
        written(folder, energy_uj=1_500_000)
        assert meter.joules == pytest.approx(2.5)


@pytest.mark.parametrize("broken", ["", "x", None])
def test_a_package_that_cannot_be_read_makes_the_whole_unknown(broken: str | None, tmp_path: Path) -> None:
    package(tmp_path, 0, 5)
    folder = package(tmp_path, 1, 5, "package-1")
    if broken is None:
        (folder / "energy_uj").unlink()
    else:
        written(folder, energy_uj=broken)
    assert sensor_of(CPU, tmp_path) is None


def test_a_sensor_that_fails_in_between_makes_energy_unknown(tmp_path: Path) -> None:
    folder = package(tmp_path, 0, 5)
    with EnergyMeter(CPU, tmp_path) as meter:
        assert meter.joules == 0
        (folder / "energy_uj").unlink()
        assert meter.joules is None
        written(folder, energy_uj=9)
    assert meter.joules is None


def hwmon(sysfs: Path) -> Path:
    folder = sysfs / "bus" / "i2c" / "drivers" / "ina3221" / "1-0040" / "hwmon" / "hwmon3"
    written(folder, in1_label="VDD_GPU_SOC", in1_input=5000, curr1_input=400)
    written(folder, in2_label="VDD_CPU_CV", in2_input=5000, curr2_input=200)
    written(folder, in3_label="VIN_SYS_5V0", in3_input=5000, curr3_input=200)
    other = sysfs / "bus" / "i2c" / "drivers" / "ina3221" / "1-0041" / "hwmon" / "hwmon4"
    written(other, in1_label="VDDQ_VDD2_1V8AO", in1_input=5000, curr1_input=100)  # fed by VIN_SYS_5V0
    written(other, in2_label="NC", in2_input=5000, curr2_input=1, in7_label="sum of shunt voltages")
    return folder


def test_rails_of_a_jetson_are_power_summed_up_over_time(tmp_path: Path, clock: Callable[[float], None]) -> None:
    folder = hwmon(tmp_path)
    sensor = sensor_of(CPU, tmp_path)
    assert sensor is not None
    assert sensor.name == "INA3221: VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0"
    assert sensor.joules() == 0
    clock(2.0)
    assert sensor.joules() == pytest.approx(2 * 4.0)
    written(folder, curr1_input=800)  # 6 W in all
    clock(1.0)
    assert sensor.joules() == pytest.approx((4.0 + 6.0) / 2)


def test_rails_that_may_be_incomplete_tell_nothing(tmp_path: Path) -> None:
    """A Thor's sensors of this kind leave a part of the module out."""
    folder = tmp_path / "bus" / "i2c" / "drivers" / "ina3221" / "2-0040" / "hwmon" / "hwmon3"
    written(folder, in1_label="VDD_GPU", in1_input=5000, curr1_input=400)
    written(folder, in2_label="VDD_CPU_SOC_MSS", in2_input=5000, curr2_input=200)
    assert sensor_of(CPU, tmp_path) is None


def test_a_jetson_s_rail_into_the_module_holds_all_others(tmp_path: Path, clock: Callable[[float], None]) -> None:
    written(hwmon(tmp_path), in4_label="VDD_IN", in4_input=19000, curr4_input=500)
    sensor = sensor_of(CPU, tmp_path)
    assert sensor is not None
    assert sensor.name == "INA3221: VDD_IN"
    sensor.joules()
    clock(10.0)
    assert sensor.joules() == pytest.approx(95.0)


def test_older_jetsons_name_their_rails_otherwise(tmp_path: Path, clock: Callable[[float], None]) -> None:
    folder = tmp_path / "bus" / "i2c" / "drivers" / "ina3221x" / "6-0040" / "iio:device0"
    written(folder, rail_name_0="POM_5V_IN", in_power0_input=4200, rail_name_1="POM_5V_GPU", in_power1_input=1000)
    sensor = sensor_of(CPU, tmp_path)
    assert sensor is not None
    assert sensor.name == "INA3221: POM_5V_IN"
    sensor.joules()
    clock(0.5)
    assert sensor.joules() == pytest.approx(2.1)


def with_nvml(monkeypatch: pytest.MonkeyPatch, integrated: bool, reading: Any) -> None:
    monkeypatch.setattr(devices, "is_integrated", lambda device: integrated)
    monkeypatch.setattr(devices, "_uuid", lambda device: "GPU-0")
    monkeypatch.setattr(nvml, "_handle", lambda pynvml, uuid: "handle")
    pynvml = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: reading())
    monkeypatch.setattr(nvml, "ask", lambda question: question(pynvml))


def test_a_gpu_counts_its_own_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [7_000]
    with_nvml(monkeypatch, False, lambda: counted[0])
    package(tmp_path, 0, 5)  # the host's does not count
    with EnergyMeter(CUDA, tmp_path) as meter:
        counted[0] = 8_250
        assert meter.joules == pytest.approx(1.25)
    assert meter.source == "NVML: the GPU"


def test_on_unified_memory_the_module_s_rails_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvml(monkeypatch, True, lambda: 1 / 0)
    package(tmp_path, 0, 5)
    assert sensor_of(CUDA, tmp_path) is None  # the CPU's counter leaves the GPU out
    hwmon(tmp_path)
    sensor = sensor_of(CUDA, tmp_path)
    assert sensor is not None
    assert sensor.name.startswith("INA3221")


def test_other_gpus_are_unknown(tmp_path: Path) -> None:
    package(tmp_path, 0, 5)
    assert sensor_of(torch.device("mps"), tmp_path) is None

"""How many joules a device takes: NVML's counter, RAPL's, or the power sensors of a Jetson.

* An NVIDIA GPU with memory of its own: NVML counts its energy in millijoules (from Volta on).
* A Jetson has INA3221 sensors of power, which a thread reads ten times a second and sums up: the rail into the
  module, or on an AGX the rails that add up to it. Other sets of rails (Thor's) are not known to be complete, nor to
  be apart from each other, so that energy is unknown there. Drivers name rails in two ways (``hwmon`` in JetPack 5
  and 6, ``iio`` before). By reading NVIDIA's documentation; not measured on a Jetson yet.
* A CPU: RAPL counts its packages' energy; since CVE-2020-8694 most systems let only root read it. The counter
  wraps within hours, so that the thread reads it every few seconds.

What is read is all that the device takes, by other programs and when idle too. Where there is no sensor, or it
fails once, energy is unknown: ``None``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgetrain.memory import device as devices

if TYPE_CHECKING:
    import torch

SYSFS = Path("/sys")
#: Rails that add up to what a module takes. An AGX Orin's VDDQ_VDD2_1V8AO is fed by its VIN_SYS_5V0.
_MODULES = (
    ("VDD_IN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)
_POWER_EVERY_S = 0.1
_COUNTER_EVERY_S = 5.0


@dataclass(frozen=True)
class Sensor:
    """An energy sensor.

    Attributes:
        name: what it is, and of what.
        interval_s: seconds after which it should be asked again.
        joules: since it was last asked; 0 at first.
    """

    name: str
    interval_s: float
    joules: Callable[[], float]


class EnergyMeter:
    """Joules within a ``with`` block.

    Args:
        device: whose energy.
        sysfs: where sensors are looked for.

    Attributes:
        source: what was asked, or ``None``.
    """

    def __init__(self, device: torch.device, sysfs: Path = SYSFS):
        self._sensor, self._sum, self._failed = sensor_of(device, sysfs), 0.0, False
        self.source = self._sensor.name if self._sensor else None
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def joules(self) -> float | None:
        """So far; ``None`` where it is unknown."""
        if self._sensor is None or self._failed:
            return None
        self._ask()
        return None if self._failed else self._sum

    def restart(self) -> None:
        """Count from 0 again."""
        self._ask()
        with self._lock:
            self._sum = 0.0

    def __enter__(self) -> EnergyMeter:
        if self._sensor is not None:
            self.restart()
            watch = partial(self._watch, self._sensor.interval_s)
            self._thread = threading.Thread(target=watch, name="edgetrain-energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._ask()

    def _watch(self, interval_s: float) -> None:
        while not self._done.wait(interval_s):
            self._ask()

    def _ask(self) -> None:
        if self._sensor is None:
            return
        with self._lock:
            try:
                self._sum += self._sensor.joules()
            except (OSError, ValueError):
                self._failed = True


def sensor_of(device: torch.device, sysfs: Path = SYSFS) -> Sensor | None:
    """The energy sensor of a device, if this machine has one that can be read."""
    if device.type == "cuda" and not devices.is_integrated(device):
        return _gpu(device)
    if device.type == "mps":
        return None
    return _rails(sysfs) or (_packages(sysfs) if device.type == "cpu" else None)


def _gpu(device: torch.device) -> Sensor | None:
    def count() -> float:
        millijoules = devices.energy_mj(device)
        if millijoules is None:
            raise OSError("NVML no longer answers")
        return millijoules / 1e3

    if devices.energy_mj(device) is None:
        return None
    return Sensor("NVML: the GPU", _COUNTER_EVERY_S, _since_last(count))


def _since_last(count: Callable[[], float], wrap: float = 0.0) -> Callable[[], float]:
    """Differences of a counter that goes back to 0 at ``wrap``."""
    last: float | None = None

    def difference() -> float:
        nonlocal last
        now = count()
        before, last = now if last is None else last, now
        return now - before if now >= before else max(0.0, now - before + wrap)

    return difference


# --- CPU packages -----------------------------------------------------------------------------


def _packages(sysfs: Path) -> Sensor | None:
    zones = [folder for folder in sorted(sysfs.glob("class/powercap/intel-rapl:*")) if folder.name.count(":") == 1]
    try:
        packages = [folder for folder in zones if _text(folder / "name").startswith("package")]
        counters = [_package(folder) for folder in packages]
        for counter in counters:
            counter()
    except (OSError, ValueError):
        return None  # a part of the packages would be a wrong figure
    if not counters:
        return None
    return Sensor("RAPL: the CPU", _COUNTER_EVERY_S, lambda: sum(counter() for counter in counters) / 1e6)


def _package(folder: Path) -> Callable[[], float]:
    wrap = _number(folder / "max_energy_range_uj")
    return _since_last(lambda: _number(folder / "energy_uj"), wrap)


# --- a Jetson's rails -------------------------------------------------------------------------


def _rails(sysfs: Path) -> Sensor | None:
    rails = {**_hwmon_rails(sysfs), **_iio_rails(sysfs)}
    names = next((names for names in _MODULES if all(name in rails for name in names)), ())
    try:
        for name in names:
            rails[name]()
    except (OSError, ValueError):
        return None
    if not names:
        return None
    return Sensor(
        f"INA3221: {', '.join(names)}", _POWER_EVERY_S, _summed_up(lambda: sum(rails[name]() for name in names))
    )


def _hwmon_rails(sysfs: Path) -> dict[str, Callable[[], float]]:
    """Watts by the name of the rail, from millivolts and milliamperes."""
    found = {}
    for label in sorted(sysfs.glob("bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in*_label")):
        number = re.sub(r"\D", "", label.name)
        volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        if (name := _name(label)) and amperes.exists():
            found[name] = _product(volts, amperes)
    return found


def _iio_rails(sysfs: Path) -> dict[str, Callable[[], float]]:
    """Watts by the name of the rail, from milliwatts."""
    found = {}
    for label in sorted(sysfs.glob("bus/i2c/drivers/ina3221x/*/iio[:_]device*/rail_name_*")):
        number = label.name.rpartition("_")[2]
        if name := _name(label):
            found[name] = _scaled(label.with_name(f"in_power{number}_input"))
    return found


def _name(label: Path) -> str | None:
    """A rail's name; none where nothing is connected, or for a sum of the others."""
    try:
        name = _text(label)
    except OSError:
        return None
    return None if name.upper() in ("", "NC") or name.lower().startswith("sum") else name


def _product(volts: Path, amperes: Path) -> Callable[[], float]:
    return lambda: _number(volts) * _number(amperes) / 1e6


def _scaled(milliwatts: Path) -> Callable[[], float]:
    return lambda: _number(milliwatts) / 1e3


def _summed_up(watts: Callable[[], float]) -> Callable[[], float]:
    """Joules since the last call, by the mean of the power at both ends."""
    last: tuple[float, float] | None = None

    def joules() -> float:
        nonlocal last
        now = time.monotonic(), watts()
        before, last = now if last is None else last, now
        return (now[0] - before[0]) * (now[1] + before[1]) / 2

    return joules


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _number(path: Path) -> float:
    return float(_text(path))

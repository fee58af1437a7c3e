"""What the host side holds, and the facts of the machine. ``pytest tests/memory/test_host.py``."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgetrain.errors import StorageError
from edgetrain.memory import host
from edgetrain.units import MIB

BLOCK = 96 * MIB


def touch(size: int) -> bytearray:
    """Memory that is resident, not only promised."""
    return bytearray(b"x") * size


def test_resident_memory_grows_with_what_is_held() -> None:
    before = host.rss_bytes()
    held = touch(BLOCK)
    assert host.rss_bytes() - before > 0.8 * len(held)


def test_the_peak_outlives_what_made_it() -> None:
    with host.PeakRss() as peak:
        held = touch(BLOCK)
        assert peak.peak_bytes - peak.start_bytes > 0.8 * BLOCK  # readable on the way
        del held
    assert peak.start_bytes > 0
    assert peak.peak_bytes - peak.start_bytes > 0.8 * BLOCK
    after = peak.peak_bytes
    held = touch(4 * BLOCK)
    assert peak.peak_bytes == after  # what comes after the block is not its own
    del held


def test_a_second_block_does_not_remember_the_first_ones_peak() -> None:
    with host.PeakRss() as first:
        del_me = touch(2 * BLOCK)
        del del_me
    with host.PeakRss() as second:
        pass
    assert second.peak_bytes < first.peak_bytes - BLOCK


def test_an_outer_block_keeps_its_peak_through_an_inner_one() -> None:
    with host.PeakRss() as outer:
        held = touch(BLOCK)
        del held
        with host.PeakRss():
            pass
    assert outer.peak_bytes - outer.start_bytes > 0.8 * BLOCK


def test_sampling_alone_finds_a_peak_that_lasts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulated: a system that does not let us reset its high-water mark."""
    monkeypatch.setattr(host, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with host.PeakRss(interval_s=0.001) as peak:
        held = touch(BLOCK)
        for _ in range(200):
            if peak._peak - peak.start_bytes > 0.8 * BLOCK:
                break
            peak._done.wait(0.01)
        del held
    assert not peak._exact
    assert peak.peak_bytes - peak.start_bytes > 0.8 * BLOCK


def test_the_block_ends_its_thread_also_when_it_fails() -> None:
    peak = host.PeakRss()

    def fail() -> None:
        with peak:
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert peak._thread is None
    assert peak not in host._running
    assert peak.peak_bytes >= peak.start_bytes


def test_the_machine_is_described_without_torch() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from edgetrain.memory import host, allocator, device; host.machine_facts(); "
            "print('torch' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_the_machine_facts_are_plausible() -> None:
    facts = host.machine_facts()
    cores = facts["cores"]
    assert isinstance(cores, int)
    assert cores >= 1
    assert isinstance(facts["ram_total_mb"], float)
    assert facts["ram_total_mb"] >= facts["ram_available_mb"] > 0
    versions = facts["versions"]
    assert isinstance(versions, dict)
    assert versions.keys() == {"torch", "numpy", "safetensors", "psutil"}
    assert all(versions.values())


def test_a_missing_package_is_unknown_not_an_error() -> None:
    assert host._version("edgetrain-no-such-package") is None


@pytest.mark.parametrize(
    ("release", "expected"),
    [("5.15.153.1-microsoft-standard-WSL2", True), ("4.4.0-19041-Microsoft", True), ("6.8.0-generic", False)],
)
def test_wsl_is_known_by_its_kernel(monkeypatch: pytest.MonkeyPatch, release: str, expected: bool) -> None:
    monkeypatch.setattr(host.platform, "release", lambda: release)
    assert host.is_wsl() is expected


def test_disk_rates_are_measured_and_nothing_stays(tmp_path: Path) -> None:
    rates = host.disk_rates(tmp_path, size=4 * MIB + 123)
    assert rates["write_mb_per_s"] > 0
    assert rates["read_mb_per_s"] > 0
    assert rates["free_mb"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_read_rate_from_the_page_cache_is_not_passed_off_as_the_disks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Simulated: a system without posix_fadvise, such as macOS."""
    monkeypatch.delattr(host.os, "posix_fadvise")
    assert host.disk_rates(tmp_path, size=MIB)["read_mb_per_s"] is None


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere: could not write .*No such file") as caught:
        host.disk_rates(tmp_path / "nowhere")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_a_storage_error_and_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Simulated: the disk fills up while we write."""

    def full(descriptor: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host, "_write", full)
    with pytest.raises(StorageError, match="No space left"):
        host.disk_rates(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_that_cannot_be_read_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with host.PeakRss(interval_s=0.001) as peak:
        before = peak.peak_bytes

        def too_many_open_files() -> int:
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")

        failed = threading.Event()
        monkeypatch.setattr(host, "rss_bytes", too_many_open_files)
        assert failed.wait(10)  # in the thread; pytest fails a test whose thread raises
        assert peak.peak_bytes >= before
    assert peak.peak_bytes >= before

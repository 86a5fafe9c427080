"""Joules and GPUs: counters with known contents where sysfs and NVML are asked."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from fake_server import FakeServer

from runtime.loadtest import energy
from runtime.loadtest.contender import Contender
from runtime.loadtest.energy import EnergyMeter, rapl_zones
from runtime.loadtest.gpu import find_gpus, gpu_memory_MB
from runtime.loadtest.load_test import Target
from runtime.loadtest.preflight import find_endpoint, open_session
from runtime.loadtest.progress import Progress
from runtime.loadtest.workload import Workload

WRAPS_AT_UJ = 262_143_328_850


def write_zone(root: Path, zone: str, name: str, energy_uJ: int) -> Path:
    """A zone as Linux shows it, and its counter."""
    directory = root / zone
    directory.mkdir()
    (directory / "name").write_text(f"{name}\n")
    (directory / "max_energy_range_uj").write_text(f"{WRAPS_AT_UJ}\n")
    counter = directory / "energy_uj"
    counter.write_text(f"{energy_uJ}\n")
    return counter


def test_each_joule_is_counted_once(tmp_path: Path) -> None:
    names = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
    }
    counters = {name: write_zone(tmp_path, zone, name, 1_000_000) for zone, name in names.items()}
    # The same package by another way, as Intel's laptops have it.
    counters["again"] = write_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    meter = EnergyMeter(rapl_zones(tmp_path))

    assert sorted(meter.sources) == ["dram", "package-0", "package-1"]
    assert meter.joules() == 0
    for watts, counter in enumerate(counters.values(), start=1):
        counter.write_text(str(1_000_000 + watts * 100_000_000))
    assert meter.joules() == pytest.approx(100 + 300 + 400)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", WRAPS_AT_UJ - 2_000_000)
    meter = EnergyMeter(rapl_zones(tmp_path))

    counter.write_text("3000000")
    assert meter.joules() == pytest.approx(5)
    counter.write_text("4000000")
    assert meter.joules() == pytest.approx(6)


def test_what_cannot_be_read_is_not_counted(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    meter = EnergyMeter(rapl_zones(tmp_path))

    assert meter.sources == []
    assert meter.joules() is None


def test_a_counter_that_is_lost_leaves_no_sum_without_it(tmp_path: Path) -> None:
    first = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    write_zone(tmp_path, "intel-rapl:1", "package-1", 0)
    meter = EnergyMeter(rapl_zones(tmp_path))

    first.unlink()
    assert meter.joules() is None


class Nvml:
    """NVML with two GPUs: one that counts energy and one that is too old to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.energy_mJ: list[int | None] = [7_000_000, None]
        self.processes: list[list[Any]] = [[], []]
        replaced = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda index: ("NVIDIA New", "NVIDIA Old")[index],
            "nvmlDeviceGetTotalEnergyConsumption": self._energy,
            "nvmlDeviceGetComputeRunningProcesses": lambda index: self.processes[index],
        }
        for name, function in replaced.items():
            assert callable(getattr(pynvml, name))  # it is called so
            monkeypatch.setattr(pynvml, name, function)

    def _energy(self, index: int) -> int:
        energy_mJ = self.energy_mJ[index]
        if energy_mJ is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return energy_mJ


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    return Nvml(monkeypatch)


def test_energy_of_gpus_that_count_it(nvml: Nvml) -> None:
    meter = EnergyMeter(find_gpus())
    nvml.energy_mJ[0] = 7_042_500

    assert meter.sources == ["NVIDIA New"]
    assert meter.joules() == pytest.approx(42.5)


@pytest.fixture
def session() -> Iterator[int]:
    """The id of a session with one process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process.pid
    process.communicate()


def test_memory_is_that_of_a_servers_own_processes(nvml: Nvml, session: int) -> None:
    ours, neighbour = SimpleNamespace(pid=session, usedGpuMemory=3_000_000_000), SimpleNamespace(pid=os.getpid())
    neighbour.usedGpuMemory = 9_000_000_000
    gone = SimpleNamespace(pid=2**22 + 1, usedGpuMemory=5)  # above the highest that Linux gives
    nvml.processes = [[neighbour, ours], [SimpleNamespace(pid=session, usedGpuMemory=500_000_000), gone]]

    assert gpu_memory_MB(find_gpus(), session) == pytest.approx(3500)
    nvml.processes[1] = []
    assert gpu_memory_MB(find_gpus(), session) == pytest.approx(3000)
    nvml.processes[0] = [neighbour]
    assert gpu_memory_MB(find_gpus(), session) is None
    nvml.processes[0] = [SimpleNamespace(pid=session, usedGpuMemory=None)]  # a driver that does not tell
    assert gpu_memory_MB(find_gpus(), session) is None


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", init)

    assert find_gpus() == []
    assert gpu_memory_MB([], os.getsid(0)) is None


@dataclass
class BurningServer(FakeServer):
    """Every answer costs 8 joules."""

    counter: Path = Path()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.counter.write_text(str(int(self.counter.read_text()) + 8_000_000))
        await super()._complete(writer, body)


async def repeats_of(server: FakeServer, *, counts_energy: bool) -> Contender:
    workload = Workload(num_prompts=6, input_len=4, output_len=4, warmups=3, repeats=2, max_concurrency=2)
    async with server.running(), open_session({}, 10) as session:
        endpoint = await find_endpoint(session, server.url, None, {}, {})
        contender = Contender(
            "A", server.url, endpoint, session, None, workload, 100, Progress(False), counts_energy=counts_energy
        )
        for number in range(2):
            await contender.repeat(number)
    return contender


def test_joules_a_token_are_those_of_the_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)

    side = asyncio.run(repeats_of(BurningServer(tokens=4, counter=counter), counts_energy=True)).side
    elsewhere = asyncio.run(repeats_of(BurningServer(tokens=4, counter=counter), counts_energy=False)).side

    # An answer has four tokens; with those of warm-up and preflight it would be more.
    assert side.energy_J_per_token == pytest.approx(2)
    assert side.energy_sources == ["package-0", "NVIDIA New"]
    assert elsewhere.energy_J_per_token is None


@pytest.mark.parametrize(
    ("name", "here"),
    [("demo", True), ("http://localhost:8000", True), ("http://[::1]:8000/v1", True), ("https://a.example.org", False)],
)
def test_energy_is_that_of_servers_on_this_machine(name: str, here: bool) -> None:
    assert Target(name).is_here is here

"""The C++ programs beside this file: under the address, undefined-behaviour and thread sanitizers, and for Arm, on an
emulated processor."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent  # where pip puts those of the package cmake
HOST_COMPILER = shlex.split(os.environ.get("CXX", "c++"))[0]  # CMake reads CXX too
ARM_COMPILER = "aarch64-linux-gnu-g++"
ARM_EMULATOR = "qemu-aarch64"


@dataclass(frozen=True)
class Variant:
    """A way to build the programs and to run them."""

    name: str
    needs: tuple[str, ...]  # commands
    options: tuple[str, ...]
    launcher: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Kept from run to run, so that only what has changed is compiled again."""
        return ROOT / "build" / f"native-{self.name}"

    def build(self) -> None:
        cmake = str(TOOLS / "cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(self.directory), *self.options]
        configure += ["-DOSP_EXTENSION=OFF", "-DOSP_TEST_PROGRAMS=ON"]
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be at it
            run(configure)
            run([cmake, "--build", str(self.directory), "--parallel", str(len(os.sched_getaffinity(0)))])

    def test(self) -> None:
        said = run([*self.launcher, str(TOOLS / "ctest"), "--test-dir", str(self.directory), "--output-on-failure"])
        assert "100% tests passed" in said


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


VARIANTS = [
    Variant("address", (HOST_COMPILER,), ("-DOSP_SANITIZE=address,undefined",)),
    Variant(
        "thread",
        (HOST_COMPILER, "setarch"),
        ("-DOSP_SANITIZE=thread",),
        # Where memory is placed widely at random, the thread sanitizer of older compilers does not start.
        ("setarch", platform.machine(), "--addr-no-randomize"),
    ),
    Variant(
        "aarch64",
        (ARM_COMPILER, ARM_EMULATOR),
        (
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}",
            f"-DCMAKE_CROSSCOMPILING_EMULATOR={ARM_EMULATOR}",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",  # so that the emulator needs no Arm libraries
        ),
    ),
]


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest) -> Variant:
    """The programs, built this way."""
    wanted: Variant = request.param
    for command in wanted.needs:
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed")
    wanted.build()
    return wanted


def variants(*names: str) -> pytest.MarkDecorator:
    wanted = [variant for variant in VARIANTS if variant.name in names]
    return pytest.mark.parametrize("variant", wanted, ids=lambda variant: variant.name, indirect=True)


@pytest.mark.timeout(900)  # a build from nothing, on a busy machine
@variants("address", "thread", "aarch64")
def test_programs(variant: Variant) -> None:
    variant.test()


@pytest.mark.timeout(900)
@variants("address", "aarch64")
def test_kernels_define_nothing_that_the_linker_could_share(variant: Variant) -> None:
    """Of an inline function that several objects define the linker keeps one: it could be the one for AVX-512, and be
    called on a processor that has no such instruction. So a kernel's object defines no weak function."""
    objects = sorted(variant.directory.glob("runtime/native/CMakeFiles/osp_native.dir/src/kernels/*.o"))
    assert objects
    for path in objects:
        listed = run(["nm", "--defined-only", str(path)])
        assert not [line for line in listed.splitlines() if line.split()[-2] == "W"], path.name

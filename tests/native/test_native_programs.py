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
PROGRAMS = sorted(path.stem for path in Path(__file__).parent.glob("*.cpp"))
HOST_COMPILER = shlex.split(os.environ.get("CXX", "c++"))[0]  # CMake reads CXX too
ARM_COMPILER = "aarch64-linux-gnu-g++"


@dataclass(frozen=True)
class Variant:
    """A way to build the programs and to run them."""

    name: str
    compiler: str
    options: tuple[str, ...]
    launcher: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Kept from run to run, so that only what has changed is compiled again."""
        return ROOT / "build" / f"native-{self.name}"

    def build(self) -> None:
        cmake = [sys.executable, "-m", "cmake"]
        configure = [*cmake, "-S", str(ROOT), "-B", str(self.directory), "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON"]
        configure += ["-DOSP_EXTENSION=OFF", "-DOSP_TEST_PROGRAMS=ON", *self.options]
        build = [*cmake, "--build", str(self.directory), "--parallel", str(len(os.sched_getaffinity(0)))]
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be at it
            for command in (configure, build):
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
                assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"

    def missing(self) -> str | None:
        return next((tool for tool in (self.compiler, *self.launcher[:1]) if shutil.which(tool) is None), None)


VARIANTS = [
    Variant("address", HOST_COMPILER, ("-DOSP_SANITIZE=address,undefined",)),
    Variant(
        "thread",
        HOST_COMPILER,
        ("-DOSP_SANITIZE=thread",),
        # Where memory is placed widely at random, the thread sanitizer of older compilers does not start.
        ("setarch", platform.machine(), "--addr-no-randomize"),
    ),
    Variant(
        "aarch64",
        ARM_COMPILER,
        (
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",  # so that the emulator needs no Arm libraries
        ),
        ("qemu-aarch64",),
    ),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> Variant:
    """The programs, built this way."""
    wanted: Variant = request.param
    if tool := wanted.missing():
        pytest.skip(f"{tool} is not installed")
    wanted.build()
    return wanted


@pytest.mark.timeout(900)  # a build from nothing, on a busy machine
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(variant: Variant, program: str) -> None:
    command = [*variant.launcher, str(variant.directory / "tests" / "native" / program)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(900)
def test_kernels_export_nothing_that_the_linker_could_share(variant: Variant) -> None:
    """Of an inline function that several objects define the linker keeps one: it could be the one for AVX-512, and be
    called on a processor that has no such instruction. So a kernel's object defines no weak function."""
    objects = sorted(variant.directory.glob("runtime/native/CMakeFiles/osp_native.dir/src/kernels/*.o"))
    assert objects
    nm = shutil.which("nm") or pytest.fail("nm is not installed; it comes with the compiler's binutils")
    for path in objects:
        listed = subprocess.run([nm, "--defined-only", str(path)], capture_output=True, text=True, check=True)
        weak = [line for line in listed.stdout.splitlines() if line.split()[-2] in "WVu"]
        assert not weak, f"{path.name}: {weak}"

"""The peers: what they are, and the virtual environment that each has for itself, with pinned versions.

The project's own dependencies stay as they are, and no peer's can disturb another's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NUMPY = "numpy==2.4.6"
LOG_LINES = 12


class InstallError(RuntimeError):
    """A peer cannot be installed; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to compare with.

    Attributes:
        module: its worker.
        whole_model: it computes all of a model; else matrix products alone.
        requirements: what its environment holds; empty for an engine of this project, which has the project's.
        built_here: packages that are compiled on this machine, for its processor.
        build_settings: environment variables for that.
        options: more of the worker's command line.
    """

    name: str
    module: str
    whole_model: bool
    requirements: tuple[str, ...] = ()
    built_here: tuple[str, ...] = ()
    build_settings: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def python(self, root: Path) -> Path:
        """Its interpreter, for environments under `root`."""
        return self._environment(root) / "bin" / "python" if self.requirements else Path(sys.executable)

    def installed(self, root: Path) -> bool:
        """Whether its environment holds what is wanted now."""
        record = self._record(root)
        return not self.requirements or (record.exists() and json.loads(record.read_text("utf-8")) == self._wanted())

    def install(self, root: Path) -> None:
        """Makes its environment under `root`, anew; takes minutes where something is compiled.

        Raises:
            InstallError: pip failed.
        """
        environment = self._environment(root)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", environment], check=True)
        pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", self.python(root)]
        command = [*pip, "install", *self.requirements]
        for package in self.built_here:
            command += ["--no-binary", package, "--no-cache-dir"]  # pip's cache does not know the processor
        log = root / self.name / "install.log"
        with log.open("wb") as output:
            settings = os.environ | self.build_settings
            done = subprocess.run(["nice", "-n", "10", *command], stdout=output, stderr=output, env=settings)
        if done.returncode != 0:
            last = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:])
            raise InstallError(
                f"{self.name} cannot be installed; the end of {log}:\n{last}\nLeave it out with --peers, or mend that."
            )
        self._record(root).write_text(json.dumps(self._wanted()), "utf-8")

    def _environment(self, root: Path) -> Path:
        return root / self.name / "venv"

    def _record(self, root: Path) -> Path:
        """Written last: an environment without it was not finished."""
        return self._environment(root) / "installed.json"

    def _wanted(self) -> dict[str, object]:
        return {
            "requirements": list(self.requirements),
            "built_here": list(self.built_here),
            "build_settings": dict(self.build_settings),
        }


OURS = Peer("osp", "benchmarks.engine_worker", whole_model=True)
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            "benchmarks.llama_cpp_worker",
            whole_model=True,
            requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", NUMPY),
            built_here=("llama-cpp-python",),
            build_settings={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        ),
        Peer("openvino", "benchmarks.openvino_worker", whole_model=False, requirements=("openvino==2026.4.0", NUMPY)),
        Peer(
            "onnxruntime",
            "benchmarks.onnxruntime_worker",
            whole_model=False,
            requirements=("onnxruntime==1.31.1", "onnx==1.23.2", NUMPY),
        ),
        Peer("osp-bf16", OURS.module, whole_model=True, options=("--precision", "bfloat16")),
    )
}

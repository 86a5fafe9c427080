"""ONNX Runtime's execution providers: what a graph runs on, asked for by name, and proof that it does.

Left to itself, ONNX Runtime goes on with the CPU where a provider is not in the package, cannot be loaded, or has no
kernel for a node. Here the first two are errors, and nodes of the third kind are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

PROVIDERS: Mapping[str, tuple[str, ...]] = {"cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt": (TENSORRT, CUDA, CPU)}
"""By the names that `--onnx-provider` takes, ONNX Runtime's own: a node goes to the first that has a kernel for it."""

DEVICES: Mapping[str, str] = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
"""Which of `onnx_directory.CACHE_TYPES` a provider computes graphs for."""

OPTIONS: Mapping[str, Mapping[str, str]] = {
    # Left on, products of floats lose 13 bits of each factor.
    CUDA: {"use_tf32": "0"},
}

PLACEMENT_ENTRY = "session.record_ep_graph_assignment_info"


class OnnxProviderError(ValueError):
    """The provider that was asked for cannot run here; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where ONNX Runtime has put the nodes of a graph: for each provider in use, how many of each operator."""

    nodes: Mapping[str, Counter[str]]

    def misplaced(self, provider: str) -> Counter[str]:
        """The nodes that run on the CPU, though the provider of that name was asked for."""
        return Counter() if provider == "cpu" else self.nodes.get(CPU, Counter())

    def described(self, provider: str) -> str:
        """The provider by ONNX Runtime's name, with the nodes of all others: as `EngineInfo.kernel`."""
        first, *others = PROVIDERS[provider]
        parts = [
            f"{other}: {', '.join(f'{count} {operator}' for operator, count in self.nodes[other].most_common())}"
            for other in others
            if other in self.nodes
        ]
        return "; ".join([first, *parts])


def require_provider(provider: str) -> None:
    """Raises `OnnxProviderError` for a name that is none, or a provider that the installed onnxruntime has not."""
    import onnxruntime

    if provider not in PROVIDERS:
        raise OnnxProviderError(f"there is no ONNX provider {provider!r}; there is: {', '.join(PROVIDERS)}")
    available = onnxruntime.get_available_providers()
    missing = [name for name in PROVIDERS[provider] if name not in available]
    if missing:
        raise OnnxProviderError(
            f"this build of onnxruntime {onnxruntime.__version__} has no {' and no '.join(missing)}, only "
            f"{', '.join(available)}: pip uninstall onnxruntime, pip install 'onnxruntime-gpu[cuda,cudnn]', or choose "
            "another provider with --onnx-provider"
        )


def open_session(graph: Path, provider: str, options: Any) -> Any:
    """An `InferenceSession` of a graph on a provider, all of whose parts are known to run.

    Args:
        provider: one that `require_provider` has passed.
        options: `SessionOptions`; one entry is added.

    Raises:
        OnnxProviderError: the provider cannot be loaded, for want of a library or a device.
        Exception: the graph cannot be loaded; the library's errors have no class of their own.
    """
    import onnxruntime

    if provider != "cpu":
        onnxruntime.preload_dlls()  # CUDA and cuDNN where pip has put them
    options.add_session_config_entry(PLACEMENT_ENTRY, "1")
    wanted = [(name, dict(OPTIONS.get(name, {}))) for name in PROVIDERS[provider]]
    # It would print a notice, and try again on the CPU.
    session = onnxruntime.InferenceSession(graph, options, providers=wanted, enable_fallback=0)
    running = session.get_providers()
    if lost := [name for name in PROVIDERS[provider] if name not in running]:
        raise OnnxProviderError(
            f"ONNX Runtime could not load {' and '.join(lost)}, and would go on with {', '.join(running)}: its own "
            "words are above. Mostly a library of CUDA, cuDNN or TensorRT is missing, or there is no GPU; or choose "
            "another provider with --onnx-provider"
        )
    return session


def placement(session: Any) -> Placement:
    """Where the nodes of a session of `open_session` are."""
    nodes: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        nodes.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return Placement(nodes)

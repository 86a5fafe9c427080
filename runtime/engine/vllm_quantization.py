"""vLLM's quantization method `osp`: from the `quantization_config` of a 4-bit checkpoint to a method for each layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from quant.format import FORMAT_VERSION, CheckpointReader
from quant.llama import HEAD
from quant.scheme import LinearScheme, Scheme
from runtime.engine.vllm_methods import LayerScheme, OspEmbeddingMethod, OspLinearMethod, UnsupportedLayerError

log = init_logger("vllm.osp")


class OspConfig(QuantizationConfig):  # type: ignore[misc]
    """`quant_method: osp`. `scheme` is the checkpoint's."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def __repr__(self) -> str:
        return f"OspConfig({self.scheme.label})"

    @classmethod
    def get_name(cls) -> str:
        return "osp"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """7.5, Turing: in float16; bfloat16 needs 8.0."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OspConfig:
        """From the `quantization_config` of config.json.

        Raises:
            ValueError: another format version, or a scheme that makes no sense.
        """
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: format version {version}; this osp-runtime reads version {FORMAT_VERSION}: "
                "quantize the model again"
            )
        return cls(Scheme.from_dict(config["scheme"]))

    def maybe_update_config(self, model_name: str, **_: Any) -> None:
        """Reads the whole checkpoint as the other engines do, so that whatever is wrong with it is an error here.

        Raises:
            CheckpointError: the checkpoint is not usable; the message names the fault.
            ValueError: the model is not a directory.
        """
        path = Path(model_name)
        if not path.is_dir():
            raise ValueError(
                f"{model_name}: quantization 'osp' checks a checkpoint before it loads it, and reads directories only: "
                "download the model first, or serve it with `osp serve`, which does"
            )
        _check_checkpoint(path.resolve())
        if self.scheme.kv_bits < 16:
            log.warning_once(
                "The checkpoint wants keys and values in %d bits, asymmetric per token and head. vLLM has no cache "
                "like that: it keeps them as --kv-cache-dtype says ('auto': in the model's number type). That costs "
                "memory, not quality.",
                self.scheme.kv_bits,
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None for those without weights.

        Raises:
            UnsupportedLayerError: vLLM fuses layers whose bits differ.
        """
        if isinstance(layer, ParallelLMHead):
            return self._linear_method(HEAD, [HEAD]) or UnquantizedEmbeddingMethod()
        if isinstance(layer, VocabParallelEmbedding):
            bits = self.scheme.embedding_bits
            table = LinearScheme(bits, "channel") if bits < 16 else None
            return UnquantizedEmbeddingMethod() if table is None else OspEmbeddingMethod(LayerScheme(table))
        if isinstance(layer, LinearBase):
            parent, _, kind = prefix.rpartition(".")
            parts = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(kind, [kind])]
            return self._linear_method(prefix, parts) or UnquantizedLinearMethod()
        return None

    def _linear_method(self, prefix: str, parts: list[str]) -> OspLinearMethod | None:
        """Of the layer `prefix`, which fuses `parts`; None where nothing of it is quantized."""
        schemes = [self.scheme.linear(part) for part in parts]
        bits = {(scheme.weight_bits, scheme.activation_bits, scheme.activation_granularity) for scheme in schemes}
        if len(bits) > 1:
            raise UnsupportedLayerError(
                f"{prefix}: vLLM computes {', '.join(part.rpartition('.')[2] for part in parts)} as one layer, but the "
                "checkpoint gives them different bits; quantize them alike, or use `osp serve --engine native`"
            )
        if schemes[0].weight_bits == 16:
            return None
        rotated = prefix.endswith(".down_proj") and self.scheme.hadamard != "none"
        return OspLinearMethod(LayerScheme(schemes[0], rotated))


@cache
def _check_checkpoint(path: Path) -> None:
    """Reads every tensor once: vLLM makes its config several times in a process."""
    reader = CheckpointReader(path)
    for name in reader.config.linear_shapes():
        reader.linear(name)
    for name in reader.config.norm_names():
        reader.norm(name)
    reader.embedding()
    reader.head()

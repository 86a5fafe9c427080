"""What the plugin's linear layers and tables are in vLLM: their parameters, how they load, what a step computes.

The parameters have the names of the checkpoint's tensors (see `quant.format`), and vLLM's loaders fuse and shard them:
packed weights along bytes, which `create_weights` makes sure are whole; scales along outputs. Of the layers whose
inputs are sharded (o_proj, down_proj), each rank sums its own inputs exactly, and vLLM adds the ranks' outputs in the
model's number type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from quant.scheme import LinearScheme
from runtime.engine.vllm_arithmetic import quantize_rows, rotate_rows, token_scales, unpack
from runtime.engine.vllm_choice import choose_kernel
from runtime.engine.vllm_kernels import CodedKernel, FusedWeight, InputScheme, Kernel

# Below "vllm", whose handlers print what its engine processes log.
log = init_logger("vllm.osp")


class UnsupportedLayerError(ValueError):
    """A layer that this checkpoint has and vLLM cannot run as it is; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LayerScheme:
    """How a layer of vLLM, which may fuse several of the checkpoint's, is quantized.

    Attributes:
        linear: bits and granularity of the inputs, bits of the weights. The granularity of weights may differ from part
            to part; each output has its scale here.
        rotated: the input passes a Hadamard transform.
    """

    linear: LinearScheme
    rotated: bool = False


class ScaleParameter(ChannelQuantScaleParameter):  # type: ignore[misc]
    """float32 [M], one scale an output; a part that has one for the whole tensor repeats it."""

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        super().load_column_parallel_weight(self._repeated(loaded_weight, self.data.shape[0]))

    def load_merged_column_weight(self, loaded_weight: Tensor, **shard: Any) -> None:
        super().load_merged_column_weight(self._repeated(loaded_weight, shard["shard_size"]), **shard)

    def load_qkv_weight(self, loaded_weight: Tensor, **shard: Any) -> None:
        super().load_qkv_weight(self._repeated(loaded_weight, shard["shard_size"]), **shard)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        super().load_row_parallel_weight(loaded_weight.expand_as(self.data))

    def _repeated(self, scale: Tensor, rows: int) -> Tensor:
        """For every rank's rows: the loader cuts this rank's out."""
        return scale.expand(rows * self.tp_size) if scale.numel() == 1 else scale


@register_weight_loader_v2_supported_method
class OspLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A quantized linear layer, the head included."""

    def __init__(self, scheme: LayerScheme) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,  # noqa: ARG002 - vLLM passes it
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Empty parameters of this rank's share; scales are NaN until they are loaded.

        Raises:
            UnsupportedLayerError: the shares of two ranks would meet within a byte.
        """
        linear = self.scheme.linear
        sharded = input_size_per_partition != input_size
        if sharded and linear.weight_bits == 4 and input_size_per_partition % 2:
            raise UnsupportedLayerError(
                f"{layer.prefix}: {input_size} inputs over {input_size // input_size_per_partition} ranks are "
                f"{input_size_per_partition} each, and two 4-bit codes share a byte; choose a tensor parallel size "
                "that leaves every rank an even number"
            )
        rows = sum(output_partition_sizes)
        load = partial(_load_table, layer) if isinstance(layer, VocabParallelEmbedding) else attributes["weight_loader"]
        for name, parameter in _weight_parameters(rows, input_size_per_partition, linear.weight_bits, load).items():
            layer.register_parameter(name, parameter)
        if linear.static:
            scale = BasevLLMParameter(torch.full((1,), torch.nan, dtype=torch.float32), weight_loader=load)
            layer.register_parameter("input_scale", scale)
        layer.params_dtype = params_dtype

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A tied head has the embedding's parameters."""
        for name in ("weight_packed", "weight_codes", "weight_scale"):
            if hasattr(embed_tokens, name):
                setattr(layer, name, getattr(embed_tokens, name))
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Makes the kernel of what was loaded, which takes the place of the parameters.

        Raises:
            ValueError: vLLM has not loaded a scale.
        """
        linear, static_scale = self.scheme.linear, None
        weight = _loaded_weight(layer, linear.weight_bits)
        if linear.static:
            _require_loaded(layer, "input_scale")
            static_scale = layer.input_scale.data.clone()
        layer.gathers = _gathers(layer, self.scheme)
        rotated = self.scheme.rotated and not layer.gathers
        inputs = InputScheme(linear.activation_bits, static_scale, rotated)
        layer.kernel = choose_kernel(weight, inputs, _output_type(layer, layer.params_dtype))
        for name in list(dict(layer.named_parameters(recurse=False))):
            delattr(layer, name)
        log.info_once("%s: %s", layer_kind(layer), layer.kernel.name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's outputs [..., M] in the type of `x` [..., K]; the head's in float32."""
        kernel: Kernel = layer.kernel
        dtype = _output_type(layer, x.dtype)
        x_NK = x.reshape(-1, x.shape[-1])
        y_NM = self._gathered(layer, x_NK, dtype) if layer.gathers else kernel(x_NK, dtype)
        y: Tensor = y_NM.reshape(*x.shape[:-1], y_NM.shape[-1])
        return y if bias is None else y + bias

    def _gathered(self, layer: Any, x_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """The outputs of this rank's inputs, which become what the whole tokens say."""
        kernel: CodedKernel = layer.kernel
        rows_NK = _rotated(layer, x_NK) if self.scheme.rotated else x_NK
        bits = kernel.inputs.bits
        if bits == 16 or kernel.inputs.scale is not None:
            return kernel(rows_NK.to(x_NK.dtype) if bits == 16 else rows_NK, dtype)
        codes_NK, scales_N1 = quantize_rows(rows_NK, _token_scales(rows_NK, bits), bits)
        return kernel.multiply(codes_NK, scales_N1, dtype)


class OspEmbeddingMethod(OspLinearMethod):
    """A quantized embedding: rows are looked up as they are stored, then widened. A tied head shares them."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing but a check: the table stays as it is stored; errors as `OspLinearMethod`'s."""
        _require_loaded(layer, "weight_scale")

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The rows of token ids, [..., D]."""
        if self.scheme.linear.weight_bits == 4:
            codes = unpack(layer.weight_packed.data[input_], layer.embedding_dim)
        else:
            codes = layer.weight_codes.data[input_]
        rows: Tensor = codes.float() * layer.weight_scale.data[input_][..., None]
        return rows.to(layer.params_dtype)


def kernels_of(model: nn.Module) -> dict[str, str]:
    """Kind of layer ("qkv_proj", "lm_head") -> the kernel that serves it in this process."""
    kernels: dict[str, set[str]] = {}
    for module in model.modules():
        kernel: Kernel | None = getattr(module, "kernel", None)
        if kernel is not None and isinstance(getattr(module, "quant_method", None), OspLinearMethod):
            kernels.setdefault(layer_kind(module), set()).add(kernel.name)
    return {kind: ", ".join(sorted(names)) for kind, names in kernels.items()}


def layer_kind(layer: Any) -> str:
    """The last word of the layer's name: "down_proj"."""
    return str(layer.prefix).rsplit(".", 1)[-1]


def _weight_parameters(rows: int, columns: int, bits: int, load: Callable[..., None]) -> dict[str, nn.Parameter]:
    name, width, dtype = ("weight_packed", (columns + 1) // 2, torch.uint8)
    if bits == 8:
        name, width, dtype = ("weight_codes", columns, torch.int8)
    codes = torch.zeros(rows, width, dtype=dtype)
    scale = torch.full((rows,), torch.nan, dtype=torch.float32)
    return {
        name: ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=load),
        "weight_scale": ScaleParameter(data=scale, output_dim=0, weight_loader=load),
    }


def _load_table(layer: Any, parameter: nn.Parameter, loaded: Tensor) -> None:
    """vLLM's loader of tables wants a row of every tensor for each token; one scale a tensor becomes one a row."""
    if isinstance(parameter, ScaleParameter) and loaded.numel() == 1:
        loaded = loaded.expand(layer.org_vocab_size)
    layer.weight_loader(parameter, loaded)


def _loaded_weight(layer: Any, bits: int) -> FusedWeight:
    _require_loaded(layer, "weight_scale")
    stored = (layer.weight_packed if bits == 4 else layer.weight_codes).data
    return FusedWeight(stored, layer.input_size_per_partition, bits, layer.weight_scale.data)


def _require_loaded(layer: Any, name: str) -> None:
    if not torch.isfinite(getattr(layer, name).data).all():
        raise ValueError(
            f"{layer.prefix or 'model.embed_tokens'}.{name}: vLLM has loaded only a part of it, or nothing"
        )


def _output_type(layer: Any, dtype: torch.dtype) -> torch.dtype:
    """The head's are float32, so that rounding makes no two logits alike."""
    return torch.float32 if isinstance(layer, ParallelLMHead) else dtype


def _gathers(layer: Any, scheme: LayerScheme) -> bool:
    """Does each rank see a part of the inputs only, while what becomes of them depends on all?"""
    per_token = scheme.linear.activation_bits < 16 and not scheme.linear.static
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and (scheme.rotated or per_token)


def _rotated(layer: Any, x_NK: Tensor) -> Tensor:
    """The transform mixes all inputs: ranks exchange theirs, and each keeps its part of the result."""
    width = x_NK.shape[-1]
    all_NK: Tensor = rotate_rows(tensor_model_parallel_all_gather(x_NK.contiguous(), dim=-1))
    return all_NK[:, layer.tp_rank * width : (layer.tp_rank + 1) * width].contiguous()


def _token_scales(x_NK: Tensor, bits: int) -> Tensor:
    """Of whole tokens, of which each rank has a part."""
    absmax_N1 = x_NK.float().abs().amax(dim=-1, keepdim=True)
    absmax_N1 = tensor_model_parallel_all_gather(absmax_N1, dim=-1).amax(dim=-1, keepdim=True)
    scales_N1: Tensor = token_scales(absmax_N1, bits)
    return scales_N1

"""A Llama with random weights as a GGUF file in Q4_0, for llama.cpp.

Q4_0 is blocks of 32 weights: a float16 scale and 16 bytes of two nibbles, of which 8 is zero. All matrices are in
Q4_0, embedding and head too; norms are float32. There is no tokenizer: GGUF knows vocabularies that are a size only.
Needs the package `gguf`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from benchmarks.random_int4 import LAYER_MATRICES, LayerMatrix, Matrix, head_matrix, layer_matrix, random_nibbles
from trainer.config import ModelConfig

BLOCK, BLOCK_BYTES = 32, 18
GGUF_NAMES: dict[LayerMatrix, str] = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """What the file has under `name`: a matrix in Q4_0, or the weight of a norm, whose width is given."""

    name: str
    content: Matrix | int

    def info(self) -> tuple[tuple[int, ...], type[np.generic], int, GGMLQuantizationType]:
        """Shape (of Q4_0 in bytes, as `GGUFWriter` wants it), type of an element, bytes, type in the file."""
        if isinstance(self.content, int):
            return (self.content,), np.float32, 4 * self.content, GGMLQuantizationType.F32
        row_bytes = self.content.K // BLOCK * BLOCK_BYTES
        return (self.content.N, row_bytes), np.uint8, self.content.N * row_bytes, GGMLQuantizationType.Q4_0

    def data(self, rng: np.random.Generator) -> NDArray[np.generic]:
        if isinstance(self.content, int):
            return np.ones(self.content, np.float32)
        return random_q4_0(rng, self.content)


def random_q4_0(rng: np.random.Generator, matrix: Matrix) -> NDArray[np.uint8]:
    """The matrix in Q4_0.

    Returns:
        [N, 18 K / 32]

    Raises:
        ValueError: K is not a multiple of 32.
    """
    if matrix.K % BLOCK:
        raise ValueError(f"{matrix.name}: Q4_0 has blocks of {BLOCK}, which do not divide a reduction of {matrix.K}")
    blocks = matrix.N * matrix.K // BLOCK
    block_bytes = np.empty((blocks, BLOCK_BYTES), np.uint8)
    block_bytes[:, :2] = np.array([matrix.scale], "<f2").view(np.uint8)
    block_bytes[:, 2:] = random_nibbles(rng, blocks * BLOCK // 2, zero=8).reshape(blocks, -1)
    return block_bytes.reshape(matrix.N, -1)


def write_random_gguf(path: Path, model: ModelConfig, context_length: int, seed: int = 0) -> None:
    """Writes the file, tensor by tensor; `path` appears when it is whole.

    Raises:
        ValueError: a width is not a multiple of 32.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    _add_shape(writer, model, context_length)
    tensors = list(_tensors(model))
    for tensor in tensors:
        shape, element, num_bytes, kind = tensor.info()
        writer.add_tensor_info(tensor.name, shape, np.dtype(element), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for tensor in tensors:
        writer.write_tensor_data(tensor.data(rng))
    writer.close()
    os.replace(partial, path)


def _add_shape(writer: GGUFWriter, model: ModelConfig, context_length: int) -> None:
    writer.add_context_length(context_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)


def _tensors(model: ModelConfig) -> Iterator[Tensor]:
    head, D = head_matrix(model), model.hidden_size
    yield Tensor("token_embd.weight", head)  # untied, of the head's shape
    for layer in range(model.num_layers):
        yield Tensor(f"blk.{layer}.attn_norm.weight", D)
        yield Tensor(f"blk.{layer}.ffn_norm.weight", D)
        for name in LAYER_MATRICES:
            yield Tensor(f"blk.{layer}.{GGUF_NAMES[name]}.weight", layer_matrix(model, name))
    yield Tensor("output_norm.weight", D)
    yield Tensor("output.weight", head)

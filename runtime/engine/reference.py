"""The reference runner: a Llama in numpy, the oracle that every other engine is held to, bit for bit.

Letters in names: N rows (the tokens of a step), L tokens of one slice, P positions of one sequence up to the slice's
end, D model dim, H query heads, G key/value heads, R query heads that share one of them, C head dim, V vocabulary;
M outputs and K inputs of a linear layer.

**Every row has its own fixed order of summation**, so that a token's logits do not depend on the batch around it, on
how its prompt was cut, or on threads. A BLAS promises none of that for floats. So:

- products of floats are `_dot_rows`: numpy's own loop, one dot product over contiguous K for each output;
- attention runs token by token, over exactly the keys that the token may see, in the order of their positions;
- sums and means run over a contiguous last axis;
- the 4-bit products are sums of integers, exact in any order, and use the BLAS (`quant.arithmetic`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quant import arithmetic
from quant.format import Checkpoint, QuantizedLinear, Tensor
from quant.llama import BLOCK_LINEARS, CheckpointError, LlamaConfig
from runtime.engine.base import EngineInfo, SequenceSlice

KV_CACHE_CONTEXTS, KV_CACHE_BYTES = 32, 2**30
"""By default the cache holds so many full contexts, or as many as fit into so many bytes, and at least one."""

KV_CACHE_MOST_BYTES = 2**35
"""A context whose keys and values take more than this is refused."""

ROTARY_STEP = 1024
"""The rotary table grows by a multiple of so many positions: a long context costs nothing before it is used."""

Floats = NDArray[np.float32]
RowFunction = Callable[[Floats], Floats]


class ReferenceRunner:
    """Runs a 4-bit or a full-precision checkpoint. Implements `ModelRunner`.

    Embedding, norms, rotary embedding, attention, KV cache, residual stream and head are float32; weights stored in 16
    bit are widened, which is exact. The body's linear layers are float32 too, or W4A4 as in
    `arithmetic.quantized_linear`.
    """

    def __init__(self, checkpoint: Checkpoint, num_blocks: int | None = None, block_size: int = 16) -> None:
        """`num_blocks` KV blocks of `block_size` positions; how many by default: see `KV_CACHE_CONTEXTS`.

        Raises:
            CheckpointError: there is not memory enough for the KV cache of one context.
        """
        config = checkpoint.config
        self._info = EngineInfo("reference", checkpoint.precision, config.max_position_embeddings, config.vocab_size)
        self._embedding_VD = _widen(checkpoint.floats["model.embed_tokens.weight"])
        self._head_VD = self._embedding_VD if config.tie_word_embeddings else _widen(checkpoint.head)
        self._final_norm = _RMSNorm(checkpoint, "model.norm")
        self._blocks = [_Block(checkpoint, f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self._rotary = _Rotary(config)
        if num_blocks is None:
            num_blocks = _default_num_blocks(checkpoint, block_size)
        try:
            self._cache = _PagedCache(config, num_blocks, block_size)
        except (MemoryError, ValueError):  # numpy raises ValueError for what no machine could address
            raise _too_long(checkpoint, num_blocks * block_size) from None

    @property
    def info(self) -> EngineInfo:
        """See `ModelRunner.info`."""
        return self._info

    @property
    def block_size(self) -> int:
        """See `ModelRunner.block_size`."""
        return self._cache.block_size

    @property
    def num_blocks(self) -> int:
        """See `ModelRunner.num_blocks`."""
        return self._cache.num_blocks

    def step(self, batch: Sequence[SequenceSlice]) -> Floats:
        """See `ModelRunner.step`."""
        x_ND = self._embedding_VD[np.concatenate([slice_.token_ids for slice_ in batch])]
        for layer, block in enumerate(self._blocks):
            x_ND = x_ND + self._attention(layer, block, x_ND, batch)
            x_ND = x_ND + block.feed_forward(x_ND)
        ends = np.cumsum([len(slice_.token_ids) for slice_ in batch])
        wanted = [np.arange(end - slice_.num_logits, end) for slice_, end in zip(batch, ends, strict=True)]
        return _dot_rows(self._final_norm(x_ND[np.concatenate(wanted)]), self._head_VD)

    def _attention(self, layer: int, block: _Block, x_ND: Floats, batch: Sequence[SequenceSlice]) -> Floats:
        q_NHC, k_NGC, v_NGC = block.project(x_ND)
        attended_NHC = np.empty_like(q_NHC)
        row = 0
        for slice_ in batch:
            end = row + len(slice_.token_ids)
            q_LHC = self._rotary(q_NHC[row:end], slice_.start)
            k_LGC = self._rotary(k_NGC[row:end], slice_.start)
            keys_PGC, values_PGC = self._cache.extend(layer, slice_, k_LGC, v_NGC[row:end])
            for i, q_HC in enumerate(q_LHC):
                seen = slice_.start + i + 1
                attended_NHC[row + i] = _attend(q_HC, keys_PGC[:seen], values_PGC[:seen])
            row = end
        return block.output(attended_NHC.reshape(len(x_ND), -1))


class _Block:
    """The weights of a transformer block, and all that it computes for each row by itself."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._head_dim = checkpoint.config.head_dim
        self._attention_norm = _RMSNorm(checkpoint, f"{prefix}.input_layernorm")
        self._feed_forward_norm = _RMSNorm(checkpoint, f"{prefix}.post_attention_layernorm")
        linears = (_linear(checkpoint.linears[f"{prefix}.{name}"]) for name in BLOCK_LINEARS)
        self._q, self._k, self._v, self.output, self._gate, self._up, self._down = linears

    def project(self, x_ND: Floats) -> tuple[Floats, Floats, Floats]:
        """Queries [N, H, C], keys and values [N, G, C], not yet rotated."""
        normed_ND = self._attention_norm(x_ND)
        heads = (len(x_ND), -1, self._head_dim)
        return self._q(normed_ND).reshape(heads), self._k(normed_ND).reshape(heads), self._v(normed_ND).reshape(heads)

    def feed_forward(self, x_ND: Floats) -> Floats:
        """SwiGLU: `down(silu(gate(x)) * up(x))`, [N, D]."""
        normed_ND = self._feed_forward_norm(x_ND)
        return self._down(_silu(self._gate(normed_ND)) * self._up(normed_ND))


class _RMSNorm:
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._weight_D = _widen(checkpoint.floats[f"{name}.weight"])
        self._eps = np.float32(checkpoint.config.rms_norm_eps)

    def __call__(self, x_ND: Floats) -> Floats:
        rms_N1: Floats = np.sqrt(np.mean(np.square(x_ND), axis=-1, keepdims=True) + self._eps)
        return x_ND / rms_N1 * self._weight_D


class _Rotary:
    """Rotary position embedding (arXiv:2104.09864) in Hugging Face's layout: element i turns with element i + C/2."""

    def __init__(self, config: LlamaConfig) -> None:
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        # Frequency and angle are rounded to float32 as in training; cosine and sine are float64's, rounded once.
        self._frequencies = (config.rope_theta**-exponents).astype(np.float32)
        self._cos_P1C, self._sin_P1C = self._table(0, 0)  # C here is half a head

    def __call__(self, x_LHC: Floats, start: int) -> Floats:
        """Turns rows that stand at positions start, start+1, …"""
        end = start + len(x_LHC)
        known = len(self._cos_P1C)
        if end > known:
            # In whole steps, so that a position's bits do not depend on when the table came to hold it.
            cos, sin = self._table(known, -(-end // ROTARY_STEP) * ROTARY_STEP)
            self._cos_P1C, self._sin_P1C = np.concatenate([self._cos_P1C, cos]), np.concatenate([self._sin_P1C, sin])
        cos, sin = self._cos_P1C[start:end], self._sin_P1C[start:end]
        first, second = np.split(x_LHC, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _table(self, start: int, end: int) -> tuple[Floats, Floats]:
        positions = np.arange(start, end).astype(np.float32)
        angles = (positions[:, None, None] * self._frequencies).astype(np.float64)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class _PagedCache:
    """Keys and values of every layer, float32 [layers, blocks, block_size, G, C]."""

    def __init__(self, config: LlamaConfig, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        # zeros, not empty, costs nothing: the system maps a page when it is first written.
        self._keys, self._values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def extend(self, layer: int, slice_: SequenceSlice, k_LGC: Floats, v_LGC: Floats) -> tuple[Floats, Floats]:
        """Writes a slice's keys and values; returns those of the whole sequence so far, [P, G, C] each."""
        end = slice_.start + len(slice_.token_ids)
        positions = np.arange(slice_.start, end)
        at = slice_.block_table[positions // self.block_size], positions % self.block_size
        table = slice_.block_table[: -(-end // self.block_size)]
        gathered = []
        for cache, new_LGC in ((self._keys[layer], k_LGC), (self._values[layer], v_LGC)):
            cache[at] = new_LGC
            gathered.append(cache[table].reshape(-1, *new_LGC.shape[1:])[:end])
        return gathered[0], gathered[1]


def _attend(q_HC: Floats, keys_PGC: Floats, values_PGC: Floats) -> Floats:
    """Scaled dot-product attention of one token, [H, C]; query head h reads key/value head h // (H / G)."""
    _, groups, head_dim = keys_PGC.shape
    q_GRC = q_HC.reshape(groups, -1, head_dim)
    scores_GRP = np.einsum("grc,pgc->grp", q_GRC, keys_PGC, order="C") / np.float32(math.sqrt(head_dim))
    weights_GRP = np.exp(scores_GRP - scores_GRP.max(axis=-1, keepdims=True))
    weights_GRP /= weights_GRP.sum(axis=-1, keepdims=True)
    attended_GRC: Floats = np.einsum("grp,pgc->grc", weights_GRP, values_PGC, order="C")
    return attended_GRC.reshape(q_HC.shape)


def _linear(weight: Tensor | QuantizedLinear) -> RowFunction:
    """float32 [N, K] -> float32 [N, M]."""
    if isinstance(weight, QuantizedLinear):
        codes_MK = weight.codes.astype(np.float32)  # held so, they need no conversion in each step
        return lambda x_NK: arithmetic.quantized_linear(x_NK, weight.input_scale, codes_MK, weight.weight_scale)
    weight_MK = _widen(weight)
    return lambda x_NK: _dot_rows(x_NK, weight_MK)


def _dot_rows(x_NK: Floats, w_MK: Floats) -> Floats:
    """`x_NK @ w_MK.T`, each output summed in one order whatever N is; without `optimize` einsum calls no BLAS."""
    # einsum sums a single output (N = M = 1) in another order than one of several: the row is computed twice.
    rows_NK = np.repeat(x_NK, 2, axis=0) if len(x_NK) == len(w_MK) == 1 else x_NK
    y_NM: Floats = np.einsum("nk,mk->nm", rows_NK, w_MK, order="C")
    return y_NM[: len(x_NK)]


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) may be infinite, and then silu(x) is rightly zero
        decay: Floats = np.exp(-x)
    return x / (1 + decay)


def _widen(weight: Tensor) -> Floats:
    return np.ascontiguousarray(weight, np.float32)


def _default_num_blocks(checkpoint: Checkpoint, block_size: int) -> int:
    blocks_per_context = -(-checkpoint.config.max_position_embeddings // block_size)
    bytes_per_block = _bytes_per_position(checkpoint.config) * block_size
    if blocks_per_context * bytes_per_block > KV_CACHE_MOST_BYTES:
        raise _too_long(checkpoint, blocks_per_context * block_size)
    return max(blocks_per_context, min(KV_CACHE_CONTEXTS * blocks_per_context, KV_CACHE_BYTES // bytes_per_block))


def _bytes_per_position(config: LlamaConfig) -> int:
    return 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _too_long(checkpoint: Checkpoint, positions: int) -> CheckpointError:
    gibibytes = positions * _bytes_per_position(checkpoint.config) / 2**30
    return CheckpointError(
        checkpoint.path,
        f"a KV cache for {positions} positions takes {gibibytes:.1f} GiB, more than there is; "
        "lower max_position_embeddings in config.json",
    )

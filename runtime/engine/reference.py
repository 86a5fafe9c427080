"""The reference runner: a Llama in numpy, the oracle that every other engine is held to, bit for bit.

Letters in names: N rows (the tokens of a step), L tokens of one slice, P positions of one sequence up to the slice's
end, D model dim, H query heads, G key/value heads, R query heads that share one of them, C head dim, V vocabulary;
M outputs and K inputs of a linear layer.

**Every row has its own fixed order of summation**, so that a token's logits do not depend on the batch around it, on
how its prompt was cut, or on threads. A BLAS promises none of that for floats. So:

- products of floats are `dot_rows`: numpy's own loop, one dot product over contiguous K for each output;
- attention runs token by token, over exactly the keys that the token may see, in the order of their positions;
- sums and means run over a contiguous last axis;
- products of codes are sums of integers, exact in any order, and use the BLAS (`quant.arithmetic`);
- Hadamard transforms add whole slices, one after another (`quant.hadamard`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quant.format import Checkpoint
from quant.scheme import LINEAR_SITES
from quant.weights import QuantizedWeight
from runtime.engine.array_logits import ArrayLogits
from runtime.engine.base import EngineInfo
from runtime.engine.kv_capacity import default_num_blocks, too_long
from runtime.engine.reference_cache import PagedCache
from runtime.engine.reference_layers import Floats, RMSNorm, Rotary, embedding, hadamard, linear, silu, widened
from runtime.engine.runner import SequenceSlice


class ReferenceRunner:
    """Runs a checkpoint in any scheme, or in full precision. Implements `ModelRunner`.

    Norms, rotary embedding, attention and residual stream are float32; weights stored in 16 bit are widened, which is
    exact. What the scheme quantizes is computed as `quant.arithmetic` says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        num_blocks: int | None = None,
        block_size: int = 16,
        kv_float: type[np.generic] = np.float32,
    ) -> None:
        """`num_blocks` KV blocks of `block_size` positions; how many by default: see `default_num_blocks`.

        Args:
            kv_float: what keys and values of 16 bits are held in. float32 is wider than the scheme asks for, so that
                full precision can be held to an oracle in float32; an engine that holds bfloat16 compares with that.

        Raises:
            CheckpointError: there is not memory enough for the KV cache of one context.
        """
        config = checkpoint.config
        self._info = EngineInfo("reference", checkpoint.precision, config.max_position_embeddings, config.vocab_size)
        table, head = checkpoint.embedding, checkpoint.head
        if not isinstance(table, QuantizedWeight):
            table = widened(table)
            head = table if config.tie_word_embeddings else head  # which widens it once
        self._embedding, self._head = embedding(table), linear(head)
        self._final_norm = RMSNorm(checkpoint.norms["model.norm.weight"], config.rms_norm_eps)
        self._blocks = [_Block(checkpoint, f"model.layers.{i}") for i in range(config.num_hidden_layers)]
        self._rotary = Rotary(config)
        kv_bits = checkpoint.scheme.kv_bits if checkpoint.scheme else 16
        self._qk_rotation = hadamard(config.head_dim) if kv_bits == 4 else None
        position_bytes = PagedCache(config, kv_bits, 1, 1, kv_float).nbytes
        if num_blocks is None:
            num_blocks = default_num_blocks(checkpoint.path, config, block_size * position_bytes, block_size)
        try:
            self._cache = PagedCache(config, kv_bits, num_blocks, block_size, kv_float)
        except (MemoryError, ValueError):  # numpy raises ValueError for what no machine could address
            raise too_long(checkpoint.path, num_blocks * block_size, position_bytes) from None

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

    def step(self, batch: Sequence[SequenceSlice]) -> ArrayLogits:
        """See `ModelRunner.step`."""
        x_ND = self._embedding(np.concatenate([slice_.token_ids for slice_ in batch]))
        for layer, block in enumerate(self._blocks):
            x_ND = x_ND + self._attention(layer, block, x_ND, batch)
            x_ND = x_ND + block.feed_forward(x_ND)
        ends = np.cumsum([len(slice_.token_ids) for slice_ in batch])
        wanted = [np.arange(end - slice_.num_logits, end) for slice_, end in zip(batch, ends, strict=True)]
        return ArrayLogits(self._head(self._final_norm(x_ND[np.concatenate(wanted)])))

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `ModelRunner.copy_blocks`."""
        self._cache.copy(sources, targets)

    def _attention(self, layer: int, block: _Block, x_ND: Floats, batch: Sequence[SequenceSlice]) -> Floats:
        q_NHC, k_NGC, v_NGC = block.project(x_ND)
        attended_NHC = np.empty_like(q_NHC)
        row = 0
        for slice_ in batch:
            end = row + len(slice_.token_ids)
            q_LHC = self._place(q_NHC[row:end], slice_.start)
            k_LGC = self._place(k_NGC[row:end], slice_.start)
            keys_PGC, values_PGC = self._cache.extend(layer, slice_, k_LGC, v_NGC[row:end])
            for i, q_HC in enumerate(q_LHC):
                seen = slice_.start + i + 1
                attended_NHC[row + i] = _attend(q_HC, keys_PGC[:seen], values_PGC[:seen])
            row = end
        return block.output(attended_NHC.reshape(len(x_ND), -1))

    def _place(self, x_LHC: Floats, start: int) -> Floats:
        """Queries or keys as attention and cache take them: turned to their positions and, for 4 bits, rotated."""
        placed_LHC = self._rotary(x_LHC, start)
        return placed_LHC if self._qk_rotation is None else self._qk_rotation(placed_LHC)


class _Block:
    """The weights of a transformer block, and all that it computes for each row by itself."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._head_dim = checkpoint.config.head_dim
        self._attention_norm, self._feed_forward_norm = (
            RMSNorm(checkpoint.norms[f"{prefix}.{name}.weight"], checkpoint.config.rms_norm_eps)
            for name in ("input_layernorm", "post_attention_layernorm")
        )
        linears = (linear(checkpoint.linears[f"{prefix}.{module}"]) for module in LINEAR_SITES.values())
        self._q, self._k, self._v, self.output, self._gate, self._up, self._down = linears

    def project(self, x_ND: Floats) -> tuple[Floats, Floats, Floats]:
        """Queries [N, H, C], keys and values [N, G, C], not yet turned."""
        normed_ND = self._attention_norm(x_ND)
        heads = (len(x_ND), -1, self._head_dim)
        return self._q(normed_ND).reshape(heads), self._k(normed_ND).reshape(heads), self._v(normed_ND).reshape(heads)

    def feed_forward(self, x_ND: Floats) -> Floats:
        """SwiGLU: `down(silu(gate(x)) * up(x))`, [N, D]."""
        normed_ND = self._feed_forward_norm(x_ND)
        return self._down(silu(self._gate(normed_ND)) * self._up(normed_ND))


def _attend(q_HC: Floats, keys_PGC: Floats, values_PGC: Floats) -> Floats:
    """Scaled dot-product attention of one token, [H, C]; query head h reads key/value head h // (H / G)."""
    _, groups, head_dim = keys_PGC.shape
    q_GRC = q_HC.reshape(groups, -1, head_dim)
    scores_GRP = np.einsum("grc,pgc->grp", q_GRC, keys_PGC, order="C") / np.float32(math.sqrt(head_dim))
    weights_GRP = np.exp(scores_GRP - scores_GRP.max(axis=-1, keepdims=True))
    weights_GRP /= weights_GRP.sum(axis=-1, keepdims=True)
    attended_GRC: Floats = np.einsum("grp,pgc->grc", weights_GRP, values_PGC, order="C")
    return attended_GRC.reshape(q_HC.shape)

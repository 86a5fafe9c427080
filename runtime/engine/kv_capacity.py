"""How many KV blocks an engine makes when nobody says."""

from __future__ import annotations

from pathlib import Path

from quant.llama import CheckpointError, LlamaConfig

CONTEXTS, BYTES = 32, 2**30
"""The cache holds so many full contexts, or as many as fit into so many bytes, and at least one."""

MOST_BYTES = 2**35
"""A context whose keys and values take more than this is refused."""


def default_num_blocks(path: Path, config: LlamaConfig, block_bytes: int, block_size: int) -> int:
    """Blocks of `block_size` positions and `block_bytes` each (all layers together).

    Raises:
        CheckpointError: one context takes more than `MOST_BYTES`.
    """
    blocks_per_context = -(-config.max_position_embeddings // block_size)
    if blocks_per_context * block_bytes > MOST_BYTES:
        raise too_long(path, blocks_per_context * block_size, block_bytes / block_size)
    return max(blocks_per_context, min(CONTEXTS * blocks_per_context, BYTES // block_bytes))


def too_long(path: Path, positions: int, position_bytes: float) -> CheckpointError:
    """The error of a context for which there is no memory."""
    return CheckpointError(
        path,
        f"a KV cache for {positions} positions takes {positions * position_bytes / 2**30:.1f} GiB, more than there is; "
        "lower max_position_embeddings in config.json",
    )

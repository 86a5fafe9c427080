"""The native engine: C++ in `src/`. Arrays are C-contiguous; a size that does not fit is a `ValueError`.

Letters: N rows, M outputs and K inputs of a linear layer, L tokens of P positions, H heads, C head dim, F width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Kernel:
    """One kernel's functions on arrays, each quantized and packed as a step would do it: for tests."""

    def __new__(cls, name: str = "") -> Kernel:
        """The kernel of that name, or the best that this processor runs. `ValueError` where it runs none so called."""

    @property
    def name(self) -> str: ...
    def quantized_linear(
        self,
        x: NDArray[np.float32],
        input_scale: float | None,
        input_bits: int,
        stored: NDArray[np.uint8] | NDArray[np.int8],
        columns: int,
        bits: int,
        scale: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """`quant.arithmetic.quantized_linear`, bit for bit: [N, K] -> [N, M].

        Args:
            input_scale: static, or None for each row's own.
            stored: uint8 [M, ceil(K / 2)] of `quant.arithmetic.pack`, or int8 [M, K].
            columns: K.
            bits: of the weights.
            scale: [1] or [M].
        """

    def linear(self, x: NDArray[np.float32], weight: NDArray[np.float32] | NDArray[np.uint16]) -> NDArray[np.float32]:
        """[N, K] times [M, K], float32 or (as uint16) bfloat16; one chain of multiply-adds over K for each output."""

    def coded_linear(
        self,
        x: NDArray[np.float32],
        stored: NDArray[np.uint8] | NDArray[np.int8],
        columns: int,
        bits: int,
        scale: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """The same for codes, stored as in `quantized_linear`, and inputs that are not quantized."""

    def rms_norm(self, x: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float32]:
        """Of [N, F], with weight [F]."""

    def quantize(
        self, x: NDArray[np.float32], scale: float | None, bits: int
    ) -> tuple[NDArray[np.int8], NDArray[np.int32], NDArray[np.float32]]:
        """Codes [N, F], their sums [N] and the scales of the rows [N], NaN where the row is lost."""

    def swiglu(self, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]:
        """`gate / (1 + exp(-gate)) * up`, [N, F]."""

    def hadamard(
        self, x: NDArray[np.float32], blocks: int, base: int, power: int, signs: NDArray[np.int8]
    ) -> NDArray[np.float32]:
        """`quant.hadamard.Hadamard(blocks, base, power).apply`, bit for bit; `signs` is `base_matrix(base)`."""

    def rotate(
        self, x: NDArray[np.float32], cosine: NDArray[np.float32], sine: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Rotary embedding of N heads, [N, C], by tables [N, C / 2]."""

    def argmax(self, x: NDArray[np.float32]) -> int:
        """The first index of the largest value; -1 where one is NaN, or where the largest is not finite."""

    def quantize_kv(
        self, x: NDArray[np.float32], bits: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
        """`quant.arithmetic.quantize_kv` of [N, C], bit for bit: codes [N, C], scales [N], zero points [N]."""

    def attend(
        self,
        queries: NDArray[np.float32],
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        bits: int,
        block_table: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Causal attention of the last L positions, [L, H, C], over one KV head of [P, C], cached in 16, 8 or 4 bits.

        `block_table` [ceil(P / 16)] says where each 16 positions lie: a permutation.
        """

def available_kernels() -> list[str]:
    """Those that this processor runs, the best first; "portable" is always among them."""

def read_GBps(bytes: int, threads: int, seconds: float) -> float:  # noqa: N802 - the unit
    """Reads from memory in 10^9 bytes a second: `threads` share so many bytes and read them for `seconds`."""

def dot_GOPS(threads: int, seconds: float) -> float:  # noqa: N802
    """8-bit multiplications and additions of the best kernel's dot products in registers, in 10^9 a second."""

class Model:
    """A Llama with its KV cache and its threads (`runtime/native/src/model.hpp`). Wrong sizes raise `ValueError`."""

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        inner: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm_eps: float,
        kv_bits: int,
        kv_blocks: int,
        max_positions: int,
        max_rows: int,
        threads: int = 0,
        kernel: str = "",
    ) -> None:
        """`max_rows`: most tokens of a step; `threads`: 0 for `available_threads()`; `kernel`: empty for the best."""

    def set_linear(
        self,
        *,
        layer: int,
        site: str,
        format: str,
        rows: int,
        columns: int,
        values: NDArray[Any] | None = None,
        scales: NDArray[np.float32] | None = None,
        input_bits: int = 16,
        input_scale: float | None = None,
        rotated: bool = False,
        seed: int = 0,
    ) -> None:
        """A matrix [rows, columns] as a checkpoint stores it; `values` None: random ones.

        `format` is "int4" (uint8, two codes a byte), "int8", "bfloat16" (uint16) or "float32". Inputs of 4 or 8 bits
        have the scale `input_scale`, or each token its own where it is None. `site` "head" has no layer.
        """

    def set_embedding(
        self,
        *,
        format: str,
        values: NDArray[Any] | None = None,
        scales: NDArray[np.float32] | None = None,
        seed: int = 0,
    ) -> None:
        """Not called for a tied model, which looks up the head's rows."""

    def set_norms(self, layer: int, attention: NDArray[np.float32], ffn: NDArray[np.float32]) -> None: ...
    def set_final_norm(self, norm: NDArray[np.float32]) -> None: ...
    def set_rotary_frequencies(self, frequencies: NDArray[np.float32]) -> None: ...
    def set_ffn_hadamard(self, blocks: int, base: int, power: int, signs: NDArray[np.int8]) -> None: ...
    def set_head_hadamard(self, blocks: int, base: int, power: int, signs: NDArray[np.int8]) -> None: ...
    def check_weights(self) -> None:
        """Raises `ValueError` where a weight was not set."""

    def step(
        self,
        tokens: NDArray[np.int32],
        starts: NDArray[np.int32],
        lengths: NDArray[np.int32],
        logits: NDArray[np.int32],
        tables: NDArray[np.int32],
        table_sizes: NDArray[np.int32],
    ) -> int:
        """Computes slices, an entry each in the arrays after `tokens` (but `tables`); returns the rows of logits."""

    def logits(self) -> NDArray[np.float32]:
        """[rows, vocabulary], read-only, of the last step and until the next."""

    def argmax(self) -> list[int]: ...
    def copy_block(self, source: int, target: int) -> None: ...
    @property
    def kernel(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...

class Team:
    """Another library's threads, which compute for `PackedLinear`; the layers of a process share one."""

    def __init__(self, threads: int, parallel: int = 0) -> None:
        """`parallel`: the address of `GOMP_parallel` in that library's OpenMP, where there are several threads."""

    @property
    def threads(self) -> int: ...

class PackedLinear:
    """One linear layer by itself, for engines that are not ours: `quant.arithmetic.quantized_linear`, bit for bit.

    Arrays are numpy's, or what speaks DLPack as torch's tensors do. Rows are float32 or bfloat16; bfloat16 outputs are
    the float32 ones, rounded once. Several threads may call a layer; they come in turns.
    """

    def __init__(
        self,
        team: Team,
        stored: Any,
        columns: int,
        bits: int,
        scale: Any,
        *,
        input_bits: int,
        input_scale: float | None = None,
        blocks: int = 1,
        power: int = 1,
        signs: Any | None = None,
        kernel: str = "",
    ) -> None:
        """Packs the weights anew: `stored`, `columns`, `bits` and `scale` are those of `Kernel.quantized_linear`.

        Args:
            input_bits: 4, 8, or 16 for inputs that are not quantized.
            input_scale: static, or None for each row's own.
            signs: `base_matrix(base)`, where rows pass `Hadamard(blocks, base, power)` before they are quantized.
            kernel: empty for the best that this processor runs.
        """

    def forward(self, x: Any, y: Any) -> None:
        """Rows [N, K] into `y` [N, M]."""

    def multiply(self, codes: Any, scales: Any, y: Any) -> None:
        """The same of codes int8 [N, K] and the scale of each row, float32 [N]; a NaN makes its row NaN."""

    def handle(self) -> NDArray[np.int64]:
        """What the operators of `implement_torch_operators` take for the layer: its address, int64 [1]. The layer lives
        as long as the array, and as tensors that share its memory."""

    @property
    def kernel(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...

BLOCK_SIZE: int

def available_threads() -> int:
    """Those that this process may use: its affinity mask, cut to its cgroup's quota."""

def implement_torch_operators(address_of: Callable[[str], int]) -> None:
    """Implements `osp::native_linear` and `osp::native_product` in the PyTorch of this process, which knows their
    schemas (`runtime/native/src/torch_operators.hpp`). `address_of`: of a function of PyTorch's stable C interface."""

def kv_block_bytes(layers: int, heads: int, channels: int, bits: int) -> int:
    """Bytes of a block of `BLOCK_SIZE` positions."""

def time_product(
    kernel: str, format: str, rows: int, outputs: int, columns: int, threads: int, seconds: float
) -> float:
    """Median seconds of one matrix product (`runtime/native/src/product_timer.hpp`)."""

"""`StepLogits` for engines whose logits are a numpy array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class ArrayLogits:
    """Implements `StepLogits` for float32 [rows, V]."""

    def __init__(self, logits_NV: NDArray[np.float32]) -> None:
        self._logits_NV = logits_NV

    def __len__(self) -> int:
        return len(self._logits_NV)

    def argmax(self) -> NDArray[np.int32]:
        """See `StepLogits.argmax`."""
        ids_N = self._logits_NV.argmax(axis=-1)  # of a row with a NaN, the place of the NaN
        usable_N = np.isfinite(self._logits_NV[np.arange(len(ids_N)), ids_N])
        return np.where(usable_N, ids_N, -1).astype(np.int32)

    def rows(self) -> NDArray[np.float32]:
        """See `StepLogits.rows`."""
        return self._logits_NV

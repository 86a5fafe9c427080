"""Room for the arithmetic on a row of logits."""

from __future__ import annotations

import numpy as np


class Workspace:
    """Arrays as long as the vocabulary, used again for each row.

    Arrays of this size go back to the system when they are freed, and cost more to get anew than to compute with.
    Whoever is handed a workspace may overwrite all of it.
    """

    def __init__(self, vocab_size: int) -> None:
        self.logits_V = np.empty(vocab_size, np.float32)
        self.weights_V = np.empty(vocab_size, np.float32)
        self.sums_V = np.empty(vocab_size, np.float64)
        self.mask_V = np.empty(vocab_size, np.bool_)

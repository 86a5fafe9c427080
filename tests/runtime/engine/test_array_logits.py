"""What `StepLogits` promises."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.engine.array_logits import ArrayLogits

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("row", "token"),
    [
        ([1, 3, 2], 1),
        ([3, 1, 3], 0),
        ([-INF, -5, -INF], 1),
        ([NAN, 1, 2], -1),
        ([1, 2, NAN], -1),
        ([NAN, INF, 0], -1),
        ([0, INF, 0], -1),
        ([-INF, -INF, -INF], -1),
    ],
)
def test_argmax(row: list[float], token: int) -> None:
    logits = ArrayLogits(np.array([[0, 1, 0], row, [2, 0, 0]], np.float32))
    assert logits.argmax().tolist() == [1, token, 0]
    assert logits.argmax().dtype == np.int32
    assert len(logits) == 3
    assert logits.rows().shape == (3, 3)


def test_no_rows() -> None:
    assert ArrayLogits(np.empty((0, 5), np.float32)).argmax().shape == (0,)

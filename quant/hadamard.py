"""Hadamard transforms of any even width: they spread an outlier over all channels, and numpy is all they need.

A Hadamard matrix H of order n holds only +1 and -1, and H H^T = n I. The transform of a width F is

    y[b, i, j] = sum_p sum_q H[i, p] S[j, q] x[b, p, q] / sqrt(m 2^k),    F = blocks * m * 2^k

with S the Sylvester matrix of order 2^k and H a matrix of order m (1, or one of Paley's or Williamson's). It is
orthogonal, so that W x = (W rotated row by row) (x rotated): `Hadamard.apply` serves weights and inputs alike.

Where the odd part of F belongs to no known matrix, the transform has that many `blocks` and mixes within each: exact
too, but an outlier spreads less far. Every engine computes in this order, so that all agree bit for bit: butterflies
over q with strides 1, 2, 4, …; then the sum over p, four at a time from first to last, of

    (H[i, p] x[p] + H[i, p+1] x[p+1]) + (H[i, p+2] x[p+2] + H[i, p+3] x[p+3])

(of four vectors there are but 16 such sums, which an engine can look up); then one multiply.

Sources: Sylvester 1867; Paley, J. Math. Phys. 12 (1933); Williamson, Duke Math. J. 11 (1944), for order 172.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Signs = NDArray[np.int8]

LARGEST_BASE = 512
"""Base matrices cost m additions a channel; beyond this order blocks are the better bargain."""

WILLIAMSON_43 = (
    "+++++-++----+-++--++-++-++--++-+----++-++++",
    "+++---++--+-+-+-++--------++-+-+-+--++---++",
    "++-+-++++-+--+--+++--++--+++--+--+-++++-+-+",
    "+-++-----++++-+-+++-++++-+++-+-++++-----++-",
)
"""First rows of four symmetric circulant matrices whose squares add up to 172 I; constant on the cosets of <6, -1>."""


@dataclass(frozen=True, slots=True)
class Hadamard:
    """The transform of one width: `width == blocks * base * power`, `power` being a power of two."""

    blocks: int
    base: int
    power: int

    @property
    def width(self) -> int:
        """Channels."""
        return self.blocks * self.base * self.power

    @classmethod
    def of_width(cls, width: int) -> Hadamard:
        """The transform of `width` that mixes the most channels, with the smallest base.

        Raises:
            ValueError: `width` is odd, so that no two channels can be mixed evenly.
        """
        power = width & -width
        if width < 2 or power == 1:
            raise ValueError(f"a Hadamard transform needs an even width, not {width}")
        odd = width // power
        if odd == 1:
            return cls(1, 1, power)
        base = 4 * odd
        while base <= min(width, LARGEST_BASE):
            if _construction(base):
                return cls(1, base, width // base)
            base *= 2
        return cls(odd, 1, power)

    def apply(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """Transforms the last axis, in the type of `x` (float32 or float64)."""
        rows = x.reshape(-1, self.blocks, self.base, self.power)
        step = 1
        while step < self.power:
            pairs = rows.reshape(-1, self.blocks, self.base, self.power // (2 * step), 2, step)
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            rows = np.stack([first + second, first - second], axis=-2)
            step *= 2
        rows = rows.reshape(-1, self.blocks, self.base, self.power)
        if self.base > 1:
            signs = base_matrix(self.base).astype(x.dtype)
            mixed = np.zeros_like(rows)
            for p in range(0, self.base, 4):  # every base matrix but the first has an order of four times something
                a, b, c, d = (signs[:, p + i, None] * rows[:, :, p + i, None, :] for i in range(4))
                mixed += (a + b) + (c + d)
            rows = mixed
        scaled: NDArray[np.floating] = rows.reshape(x.shape) * x.dtype.type(1 / math.sqrt(self.base * self.power))
        return scaled

    def matrix(self) -> NDArray[np.float64]:
        """The whole orthogonal matrix, float64 [width, width]: `apply(x) == x @ matrix().T`."""
        return np.ascontiguousarray(self.apply(np.eye(self.width)).T)


@lru_cache(maxsize=32)
def base_matrix(order: int) -> Signs:
    """A Hadamard matrix, int8 [order, order]; read-only.

    Raises:
        ValueError: none of that order is known here.
    """
    construction = _construction(order)
    if construction == "one":
        matrix = np.ones((1, 1), np.int8)
    elif construction == "paley-1":
        matrix = _paley_1(order - 1)
    elif construction == "paley-2":
        matrix = _paley_2(order // 2 - 1)
    elif construction == "williamson":
        matrix = _williamson()
    else:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    matrix.setflags(write=False)
    return matrix


def sylvester(order: int) -> Signs:
    """The Sylvester matrix of a power of two, int8 [order, order]."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _construction(order: int) -> str | None:
    if order == 1:
        return "one"
    if order % 4 == 0 and _is_prime(order - 1):  # a prime that is 3 modulo 4
        return "paley-1"
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return "paley-2"
    return "williamson" if order == 172 else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(q: int) -> Signs:
    """[i, j] is the Legendre symbol of i - j modulo the prime q."""
    symbol = np.full(q, -1, np.int8)
    symbol[[x * x % q for x in range(1, q)]] = 1
    symbol[0] = 0
    index = np.arange(q)
    matrix: Signs = symbol[(index[:, None] - index) % q]
    return matrix


def _paley_1(q: int) -> Signs:
    skew = np.zeros((q + 1, q + 1), np.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + np.eye(q + 1, dtype=np.int8)


def _paley_2(q: int) -> Signs:
    symmetric = np.zeros((q + 1, q + 1), np.int8)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _jacobsthal(q)
    one = np.array([[1, 1], [1, -1]], np.int8)
    zero = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(symmetric, one) + np.kron(np.eye(q + 1, dtype=np.int8), zero)


def _williamson() -> Signs:
    """Williamson's array of four symmetric circulant matrices of order 43."""
    index = np.arange(43)
    a, b, c, d = (
        np.array([1 if sign == "+" else -1 for sign in row], np.int8)[(index[:, None] - index) % 43]
        for row in WILLIAMSON_43
    )
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])

"""The keys by which the KV blocks of a common prefix are found."""

from __future__ import annotations

from array import array
from copy import copy
from hashlib import sha256


class PrefixKeys:
    """Keys of a sequence's full blocks: key i stands for all tokens up to the end of block i, and for the salt.

    Each is SHA-256 of the key before it and of the block's token ids, so that nobody can make a prompt that is taken
    for another. They are computed as they are asked for: a prompt that has nothing in the cache costs one key.
    """

    def __init__(self, tokens: list[int], block_size: int, salt: str | None) -> None:
        """`tokens` may grow at its end later on."""
        self._tokens = tokens
        self._block_size = block_size
        # A salt may hold half of a surrogate pair, as any Python string may.
        self._root = b"" if salt is None else sha256(salt.encode(errors="surrogatepass")).digest()
        self._keys: list[bytes] = []

    def __getitem__(self, index: int) -> bytes:
        """The key of block `index`, all of whose tokens are known."""
        while len(self._keys) <= index:
            start = len(self._keys) * self._block_size
            ids = array("q", self._tokens[start : start + self._block_size])
            parent = self._keys[-1] if self._keys else self._root
            self._keys.append(sha256(parent + ids.tobytes()).digest())
        return self._keys[index]

    def fork(self, tokens: list[int]) -> PrefixKeys:
        """The keys of another sequence, `tokens`, that begins as this one does, and then goes its own way."""
        child = copy(self)
        child._tokens, child._keys = tokens, list(self._keys)
        return child

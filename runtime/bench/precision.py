"""What a measured model is quantized to, from its name: "bfloat16", or a scheme with bits of other sites after it."""

from __future__ import annotations

import re

from quant.scheme import Scheme, SchemeError, named

FULL_PRECISION = "bfloat16"
DEFAULT_PRECISION = "w4a4-kv4-head4-embedding4"

PART = re.compile(r"-(kv|head|embedding)(4|8|16)$")


def scheme_of(precision: str) -> Scheme | None:
    """The scheme of "w4a4-kv4-head4-embedding4" and the like, with the FFN Hadamard transform; None for "bfloat16".

    Raises:
        SchemeError: no such precision.
    """
    if precision == FULL_PRECISION:
        return None
    name, bits = precision, dict[str, int]()
    while match := PART.search(name):
        bits[match[1]] = int(match[2])
        name = name[: match.start()]
    try:
        scheme = named(name)
    except SchemeError as error:
        raise SchemeError(f"precision {precision!r}: {error}, or {FULL_PRECISION}") from None
    settings = {"kv": "kv_bits", "embedding": "embedding_bits", "head": "head"}
    return scheme.changed(hadamard="ffn", **{settings[site]: value for site, value in bits.items()})

"""What is quantized, to how many bits, at which granularity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from reprlib import repr as shortened
from typing import Any


class SchemeError(ValueError):
    """A scheme that is unknown, or that asks for something this version does not do; the message says what."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantization scheme. `bits` of 16 mean bfloat16, that is, not quantized.

    Body weights and activations are the linear layers of the transformer blocks and their inputs. `tensor`
    granularity is one scale a tensor; activations are `static` (calibrated once, stored in the checkpoint).
    """

    name: str
    weight_bits: int
    weight_granularity: str
    activation_bits: int
    activation_granularity: str
    activation_mode: str
    head_bits: int = 16
    embedding_bits: int = 16
    kv_bits: int = 16

    def to_dict(self) -> dict[str, Any]:
        """As written into `config.json`, under `quantization_config`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Scheme:
        """Reads `to_dict`'s form.

        Raises:
            SchemeError: fields are missing or unknown, or the values are not those of a known scheme.
        """
        try:
            scheme = cls(**fields)
        except TypeError as error:
            raise SchemeError(f"not a quantization scheme: {error}") from None
        known = named(scheme.name)
        if scheme != known:
            raise SchemeError(f"scheme {known.name!r} with {shortened(fields)} is not one this version can run")
        return known


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="w4a4",
            weight_bits=4,
            weight_granularity="tensor",
            activation_bits=4,
            activation_granularity="tensor",
            activation_mode="static",
        ),
    )
}


def named(name: object) -> Scheme:
    """The scheme called `name`.

    Raises:
        SchemeError: there is none; the message lists those there are.
    """
    if not isinstance(name, str) or name not in SCHEMES:  # a file may hold anything
        raise SchemeError(f"unknown scheme {shortened(name)}; known: {', '.join(sorted(SCHEMES))}")
    return SCHEMES[name]

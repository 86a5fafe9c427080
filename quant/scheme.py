"""What is quantized, to how many bits, at which granularity.

A scheme says it for each *site*: the kinds of linear layers (q, k, v, o, gate, up, down, head), the embedding and the
KV cache. It starts from a named one and may differ from it at any site, on the command line or in a YAML file:

    scheme: w4a4
    kv_bits: 4
    hadamard: ffn
    down: {activation_bits: 8}
    head: {weight_bits: 8}
    embedding_bits: 8
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

LINEAR_SITES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The linear sites of a transformer block and their module names; `head` is lm_head."""

SHARED_INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Sites that read one tensor, and hence share what is done to it."""

BITS = (4, 8, 16)
HADAMARDS = ("none", "ffn", "full")


class SchemeError(ValueError):
    """A scheme that is unknown, or that makes no sense; the message says where and why."""


@dataclass(frozen=True, slots=True)
class LinearScheme:
    """How a linear layer is quantized; 16 bits mean not at all.

    Attributes:
        weight_bits: 4, 8 or 16.
        weight_granularity: "tensor" (one scale) or "channel" (one an output channel).
        activation_bits: of the layer's input: 4, 8 or 16.
        activation_granularity: "tensor" (one static scale, calibrated) or "token" (one a token, dynamic).
    """

    weight_bits: int = 16
    weight_granularity: str = "tensor"
    activation_bits: int = 16
    activation_granularity: str = "tensor"

    @property
    def static(self) -> bool:
        """Does the input have a calibrated scale?"""
        return self.activation_bits < 16 and self.activation_granularity == "tensor"


@dataclass(frozen=True, slots=True)
class Scheme:
    """A whole scheme. `name` is that of the scheme it started from; `label` tells variants apart.

    Attributes:
        kv_bits: keys and values in the cache: 16 (not quantized), or 8 or 4, asymmetric, per token and head. With 4,
            queries and keys pass a Hadamard transform after the rotary embedding.
        hadamard: "ffn": the input of down_proj is rotated, in the engine, and its weight beforehand. "full": residual
            stream and heads are rotated too, which is all done to the weights and which no engine notices.
    """

    name: str
    q: LinearScheme
    k: LinearScheme
    v: LinearScheme
    o: LinearScheme
    gate: LinearScheme
    up: LinearScheme
    down: LinearScheme
    head: LinearScheme = LinearScheme()
    embedding_bits: int = 16
    kv_bits: int = 16
    hadamard: str = "none"

    def __post_init__(self) -> None:
        for site in (*LINEAR_SITES, "head"):
            _check_linear(site, getattr(self, site))
        for key in ("embedding_bits", "kv_bits"):
            _check_choice(key, getattr(self, key), BITS)
        _check_choice("hadamard", self.hadamard, HADAMARDS)
        for sites in SHARED_INPUTS:
            inputs = {
                (linear.activation_bits, linear.activation_granularity)
                for linear in (getattr(self, site) for site in sites)
                if linear.activation_bits < 16
            }
            if len(inputs) > 1:
                raise SchemeError(
                    f"{', '.join(sites)}: they read one tensor, so that their activations cannot be quantized in "
                    "different ways; give them the same activation_bits and activation_granularity"
                )
        quantized = [self.embedding_bits, self.kv_bits, self.head.weight_bits]
        quantized += [getattr(self, site).weight_bits for site in LINEAR_SITES]
        if min(quantized) == 16:
            raise SchemeError("nothing is quantized: every site has 16 bits")

    def linear(self, module: str) -> LinearScheme:
        """That of a module by its name in the model ("model.layers.0.mlp.down_proj", "lm_head").

        Raises:
            KeyError: it is not the name of a linear layer.
        """
        if module == "lm_head":
            return self.head
        sites = [site for site, suffix in LINEAR_SITES.items() if module.endswith(f".{suffix}")]
        if not sites:
            raise KeyError(module)
        return getattr(self, sites[0])  # type: ignore[no-any-return]

    @property
    def label(self) -> str:
        """The bits in a short word, for people and metrics: "w4a4", "w4a4-kv4-head8-embedding8"; "+" where sites differ
        from what those words say. The rotation is not in it."""
        base = SCHEMES.get(self.name)
        parts = [self.name]
        parts += [f"kv{self.kv_bits}"] if self.kv_bits < 16 else []
        parts += [f"head{self.head.weight_bits}"] if self.head.weight_bits < 16 else []
        parts += [f"embedding{self.embedding_bits}"] if self.embedding_bits < 16 else []
        differs = base is None or any(getattr(self, site) != getattr(base, site) for site in LINEAR_SITES)
        differs = differs or self.head != QUANTIZED_HEAD[self.head.weight_bits]
        return "-".join(parts) + ("+" if differs else "")

    def changed(self, /, **changes: Any) -> Scheme:
        """This scheme with other settings. A linear site takes a mapping with those of its settings that differ; the
        head also a number of bits, which means weights of so many bits, one scale an output channel, and inputs of 8
        bits per token.

        Raises:
            SchemeError: an unknown setting, or one that makes no sense.
        """
        known = {field.name for field in fields(self)} - {"name"}
        resolved: dict[str, Any] = {}
        for key, value in changes.items():
            if "group" in key:
                raise SchemeError(f"{key}: {NO_GROUPS}")
            if key not in known:
                raise SchemeError(f"unknown setting {key!r}; known: {', '.join(sorted(known))}")
            if key == "head" and isinstance(value, int):
                _check_choice("head", value, BITS)
                value = QUANTIZED_HEAD[value]
            elif key in LINEAR_SITES or key == "head":
                start = QUANTIZED_HEAD[8] if key == "head" and self.head.weight_bits == 16 else getattr(self, key)
                value = _changed_linear(key, start, value)
            resolved[key] = value
        return replace(self, **resolved)

    def to_dict(self) -> dict[str, Any]:
        """As written into `config.json`, under `quantization_config`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Scheme:
        """Reads `to_dict`'s form.

        Raises:
            SchemeError: settings are missing, unknown or make no sense.
        """
        missing = {field.name for field in fields(cls)} - set(content)
        if missing:
            raise SchemeError(f"not a quantization scheme: {', '.join(sorted(missing))} missing")
        named(content["name"])
        sites = {}
        for site in (*LINEAR_SITES, "head"):
            absent = {field.name for field in fields(LinearScheme)} - set(_mapping(site, content[site]))
            if absent:
                raise SchemeError(f"{site}: {', '.join(sorted(absent))} missing")
            sites[site] = _changed_linear(site, LinearScheme(), content[site])
        settings: dict[str, Any] = {**content, **sites}
        try:
            return cls(**settings)
        except TypeError as error:
            raise SchemeError(f"not a quantization scheme: {error}") from None


NO_GROUPS = (
    "one scale a tensor or an output channel is what there is; scales of groups would lie inside the integer sums"
)


QUANTIZED_HEAD = {
    16: LinearScheme(),
    8: LinearScheme(8, "channel", 8, "token"),
    4: LinearScheme(4, "channel", 8, "token"),
}
"""What a number of bits means for the head: its input is the end of the residual stream, which 8 bits hold well."""


def named(name: object) -> Scheme:
    """The scheme called `name`.

    Raises:
        SchemeError: there is none; the message lists those there are.
    """
    if not isinstance(name, str) or name not in SCHEMES:  # a file may hold anything
        raise SchemeError(f"unknown scheme {shortened(name)}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def read_scheme(path: str | os.PathLike[str]) -> Scheme:
    """A scheme from a YAML file: `scheme` names where it starts, every other key is a setting of `Scheme.changed`.

    Raises:
        SchemeError: the file cannot be read, or says what makes no sense; the message names the file.
    """
    import yaml  # only those who write schemes need it

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SchemeError(f"{path}: cannot be read: {error}") from None
    try:
        settings = {str(key): value for key, value in _mapping("a scheme file", content).items()}
        return named(settings.pop("scheme", "w4a4")).changed(**settings)
    except SchemeError as error:
        raise SchemeError(f"{path}: {error}") from None


def _mapping(where: str, value: object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise SchemeError(f"{where}: settings by name are wanted, not {shortened(value)}")
    return value


def _changed_linear(site: str, linear: LinearScheme, value: object) -> LinearScheme:
    if isinstance(value, LinearScheme):
        return value
    changes = {str(key): setting for key, setting in _mapping(site, value).items()}
    known = [field.name for field in fields(LinearScheme)]
    for key in changes:
        if "group" in key:
            raise SchemeError(f"{site}.{key}: {NO_GROUPS}")
        if key not in known:
            raise SchemeError(f"{site}: unknown setting {key!r}; known: {', '.join(known)}")
    changed = replace(linear, **changes)
    # What is not quantized has no granularity.
    if changed.weight_bits == 16 and "weight_granularity" not in changes:
        changed = replace(changed, weight_granularity="tensor")
    if changed.activation_bits == 16 and "activation_granularity" not in changes:
        changed = replace(changed, activation_granularity="tensor")
    return changed


def _check_linear(site: str, linear: object) -> None:
    if not isinstance(linear, LinearScheme):
        raise SchemeError(f"{site}: not the settings of a linear layer: {shortened(linear)}")
    _check_choice(f"{site}.weight_bits", linear.weight_bits, BITS)
    _check_choice(f"{site}.activation_bits", linear.activation_bits, BITS)
    _check_choice(f"{site}.weight_granularity", linear.weight_granularity, ("tensor", "channel"))
    _check_choice(f"{site}.activation_granularity", linear.activation_granularity, ("tensor", "token"))
    if linear.activation_bits < linear.weight_bits:
        raise SchemeError(
            f"{site}: activations of {linear.activation_bits} bits with weights of {linear.weight_bits} bits: an "
            "integer product needs weights that are at least as coarse as the activations"
        )
    for kind, bits, granularity in (
        ("weight", linear.weight_bits, linear.weight_granularity),
        ("activation", linear.activation_bits, linear.activation_granularity),
    ):
        if bits == 16 and granularity != "tensor":
            raise SchemeError(f"{site}: {kind}_granularity {granularity!r} says nothing where {kind}_bits is 16")


def _check_choice(where: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | str) or value not in choices:
        raise SchemeError(f"{where} is {shortened(value)}; it must be one of {', '.join(map(str, choices))}")


def _uniform(name: str, linear: LinearScheme) -> Scheme:
    return Scheme(name, linear, linear, linear, linear, linear, linear, linear)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        _uniform("w4a4", LinearScheme(4, "tensor", 4, "tensor")),
        _uniform("w4a4-token", LinearScheme(4, "channel", 4, "token")),
        _uniform("w4a8", LinearScheme(4, "tensor", 8, "tensor")),
        _uniform("w4a16", LinearScheme(4, "tensor")),
    )
}
"""By name; see docs/quantization.md."""

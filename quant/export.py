"""Writes a quantized checkpoint in the form that transformers and vLLM read: compressed-tensors. No torch.

The directory holds what any model's does, with the codes in `model.safetensors`. A module `P` with 16 bits is one
tensor `P.weight`, as in the source. A quantized one is

    P.weight_packed  int32     [M, ceil(K / 8)]   4 bits: eight codes a word, each plus 8, the first in the lowest bits
    P.weight_shape   int64     [2]                M and K, beside it
    P.weight         int8      [M, K]             8 bits
    P.weight_scale   bfloat16  [M, 1]             one an output channel: that of a tensor, repeated

and `quantization_config` says which modules have how many bits. Codes and scales are those of the source, bit for bit.

A stock engine knows neither the Hadamard transform of a layer's input nor a calibrated input scale a tensor, and vLLM
holds q, k and v in one matrix. So `quantization_config` refuses a scheme that an engine would compute wrongly from what
can be written; what each engine computes from the rest stands in docs/interchange.md.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quant.directories import appearing_whole, copy_companions
from quant.files import read_json, write_json
from quant.format import CheckpointReader
from quant.llama import EMBEDDING, HEAD, CheckpointError
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, Scheme, SchemeError
from quant.tensors import WEIGHTS_FILE, Tensor
from quant.weights import QuantizedLinear, QuantizedWeight

FORMATS = ("compressed-tensors",)
ACTIVATIONS = ("none", "token")

EXPORTED_SITES = {**LINEAR_SITES, "head": HEAD}
"""The linear sites and how their modules' names end."""

PACKED, PLAIN = "pack-quantized", "int-quantized"
"""What compressed-tensors calls the two layouts."""


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites whose weights have the same bits, and their inputs too; 16 mean not quantized."""

    weight_bits: int
    input_bits: int
    sites: tuple[str, ...]

    @property
    def layout(self) -> str:
        """How compressed-tensors calls the layout of the codes."""
        return PACKED if self.weight_bits == 4 else PLAIN

    def to_config(self) -> dict[str, Any]:
        """As an entry of `config_groups`."""
        weights = {"strategy": "channel", "dynamic": False}
        inputs = {"strategy": "token", "dynamic": True}
        return {
            "targets": [_target(site) for site in self.sites],
            "format": self.layout,
            "weights": {"num_bits": self.weight_bits, "type": "int", "symmetric": True, **weights},
            "input_activations": None
            if self.input_bits == 16
            else {"num_bits": self.input_bits, "type": "int", "symmetric": True, **inputs},
            "output_activations": None,
        }


def export_checkpoint(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, activations: str = "none"
) -> dict[str, Any]:
    """Writes the quantized checkpoint at `source` into the directory `out`, which appears whole or not at all.

    Args:
        activations: "none": no input is quantized. "token": each input has the bits of its scheme, and one scale a
            token that the engine finds as the token comes.

    Returns:
        What was written: format, activations, groups of sites with their bits, sites of 16 bits, bytes, and notes,
        which are sentences on what became other than in the source.

    Raises:
        CheckpointError: `source` is not a usable quantized checkpoint, or is one that stock engines cannot compute.
        FileExistsError: `out` exists and is not an empty directory.
        OSError: `out` cannot be made.
    """
    reader = CheckpointReader(source)
    if reader.scheme is None:
        raise CheckpointError(
            reader.path, "is not quantized: transformers and vLLM load it as it is; to export 4 bits, quantize it first"
        )
    try:
        groups = site_groups(reader.scheme, activations)
    except SchemeError as error:
        raise CheckpointError(reader.path, f"cannot be exported: {error}") from None
    with appearing_whole(Path(out)) as partial:
        copy_companions(reader.path, partial)
        config_json = read_json(reader.path, "config.json", "")
        config_json["quantization_config"] = quantization_config(groups)
        write_json(partial / "config.json", config_json)
        write_json(partial / "osp.json", _provenance(reader.provenance, reader.scheme, activations))
        tensors = exported_tensors(reader)
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets only the owner read its files; a server often runs as another user.
        shutil.copymode(partial / "config.json", partial / WEIGHTS_FILE)
    return {
        "format": FORMATS[0],
        "activations": activations,
        "groups": [
            {"weight_bits": group.weight_bits, "input_bits": group.input_bits, "sites": list(group.sites)}
            for group in groups
        ],
        "sixteen_bit": _sixteen_bit(groups),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "notes": _notes(reader.scheme, groups, activations),
    }


def site_groups(scheme: Scheme, activations: str) -> list[SiteGroup]:
    """The quantized sites of a scheme by their bits in the export, fewest first.

    Raises:
        SchemeError: a stock engine would compute the scheme wrongly or cannot hold it; the message says what to do.
    """
    if activations not in ACTIVATIONS:
        raise SchemeError(f"activations {activations!r}; known: {', '.join(ACTIVATIONS)}")
    if scheme.hadamard != "none" and scheme.down.weight_bits < 16:
        raise SchemeError(
            f"hadamard {scheme.hadamard!r} rotates the input of down_proj as the model runs, which no stock engine "
            "does, and its weights are rotated already; quantize with --hadamard none"
        )
    if scheme.embedding_bits < 16:
        raise SchemeError(
            f"its embedding has {scheme.embedding_bits} bits, which not every stock engine can hold, and 16 bits do "
            "not hold codes times scales exactly; quantize with --embedding 16 (and --head 16 where it is tied)"
        )
    bits = {site: _bits(scheme, site, activations) for site in EXPORTED_SITES}
    for sites in SHARED_INPUTS:
        if len({bits[site] for site in sites}) > 1:
            listed = "; ".join(f"{site} {bits[site][0]} and {bits[site][1]}" for site in sites)
            raise SchemeError(
                f"vLLM holds {', '.join(sites)} in one matrix, so that they must have the same bits of weights and of "
                f"inputs, not {listed}; quantize them alike"
            )
    if (8, 16) in bits.values():
        listed = ", ".join(site for site in bits if bits[site] == (8, 16))
        raise SchemeError(
            f"weights of 8 bits with inputs of 16 ({listed}) have no form that every stock engine reads rightly beside "
            "4-bit ones; export them with --activations token if their inputs have 8 bits, or quantize them to 4 or 16"
        )
    quantized = {pair for pair in bits.values() if pair[0] < 16}
    if not quantized:
        raise SchemeError("its only quantization is that of the KV cache, which is the engine's own affair")
    if activations == "token" and all(inputs == 16 for _, inputs in quantized):
        raise SchemeError(f"the scheme {scheme.label} quantizes no inputs; export it with --activations none")
    return [SiteGroup(*pair, tuple(site for site in bits if bits[site] == pair)) for pair in sorted(quantized)]


def quantization_config(groups: list[SiteGroup]) -> dict[str, Any]:
    """The entry of config.json that tells engines what is quantized."""
    layouts = {group.layout for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"w{group.weight_bits}a{group.input_bits}": group.to_config() for group in groups},
        "ignore": [_target(site) for site in _sixteen_bit(groups)],
        "kv_cache_scheme": None,
    }


def exported_tensors(reader: CheckpointReader) -> dict[str, Tensor]:
    """Every tensor of the export by name.

    Raises:
        CheckpointError: a value in the source is not finite, or is none that a quantizer writes.
    """
    modules = [*reader.config.linear_shapes(), *([] if reader.config.tie_word_embeddings else [HEAD])]
    tensors: dict[str, Tensor] = {}
    for name in modules:
        linear = reader.linear(name)
        if isinstance(linear, QuantizedLinear):
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in _weight_tensors(linear.weight).items()}
        else:
            tensors[f"{name}.weight"] = linear
    embedding = reader.embedding()
    assert not isinstance(embedding, QuantizedWeight)  # `site_groups` refuses it
    return (
        tensors | {f"{EMBEDDING}.weight": embedding} | {name: reader.norm(name) for name in reader.config.norm_names()}
    )


def pack_words(packed_MB: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Eight 4-bit codes a word, each plus 8, from two codes a byte in two's complement.

    Args:
        packed_MB: uint8 [M, B], as `arithmetic.pack` makes it.

    Returns:
        int32 [M, ceil(B / 4)]; the codes that fill the last word are zero.
    """
    padded_MB = np.pad(packed_MB, ((0, 0), (0, -packed_MB.shape[1] % 4)))
    # Adding 8 to a nibble, without a carry, flips its sign bit.
    return (padded_MB ^ np.uint8(0x88)).view("<i4")


def _weight_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    rows, columns = weight.shape
    scale = np.broadcast_to(weight.scale[:, None], (rows, 1)).astype(ml_dtypes.bfloat16)
    if weight.bits == 8:
        return {"weight": np.ascontiguousarray(weight.codes), "weight_scale": scale}
    packed = {"weight_packed": pack_words(weight.stored.view(np.uint8)), "weight_shape": np.array([rows, columns])}
    return {**packed, "weight_scale": scale}


def _bits(scheme: Scheme, site: str, activations: str) -> tuple[int, int]:
    """Those of a site's weights and inputs in the export."""
    linear = getattr(scheme, site)
    return linear.weight_bits, linear.activation_bits if activations == "token" else 16


def _target(site: str) -> str:
    return f"re:.*{re.escape(EXPORTED_SITES[site])}$"


def _sixteen_bit(groups: list[SiteGroup]) -> list[str]:
    quantized = {site for group in groups for site in group.sites}
    return [site for site in EXPORTED_SITES if site not in quantized]


def _provenance(provenance: Mapping[str, Any], scheme: Scheme, activations: str) -> dict[str, Any]:
    """osp.json. What was measured of the source is left out: another engine computes something else."""
    carried = {key: provenance[key] for key in provenance if key in ("tokenizer_sha256", "training")}
    export = {"format": FORMATS[0], "activations": activations, "scheme": scheme.to_dict()}
    return {"tool_version": version("osp-runtime"), **carried, "export": export}


def _notes(scheme: Scheme, groups: list[SiteGroup], activations: str) -> list[str]:
    """What engines compute otherwise than the scheme says, a sentence each."""
    notes = []
    inputs = [site for site in EXPORTED_SITES if getattr(scheme, site).activation_bits < 16]
    static = [site for site in EXPORTED_SITES if getattr(scheme, site).static]
    if activations == "none" and inputs:
        notes.append(f"inputs of {', '.join(inputs)} keep 16 bits, though the scheme quantizes them")
    if activations == "token" and static:
        notes.append(f"calibrated input scales are dropped ({', '.join(static)}): engines find one for every token")
    if any(group.weight_bits == 4 and group.input_bits < 16 for group in groups):
        notes.append(
            "vLLM quantizes the inputs of 4-bit weights with its Humming kernels alone (NVIDIA, --linear-backend "
            "humming); with all others, those of CPUs too, it computes with 16-bit inputs and does not say so"
        )
    if scheme.kv_bits < 16:
        notes.append(
            f"how the KV cache is quantized is the engine's own affair: it will have 16 bits, not {scheme.kv_bits}"
        )
    return notes

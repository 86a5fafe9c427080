"""The scales that tuning has learned: `scales.safetensors`, beside the 16-bit weights that it tuned. No torch.

    P.weight_scale  float32 [1] or [M]   of every linear layer P of the body whose weight the scheme quantizes
    P.input_scale   float32 [1]          where the scheme gives the input a static scale

All are positive, normal bfloat16 numbers; layers that read one tensor have one input scale. They belong to the weights
as they are rounded: that of a rotated down_proj to the rotated weight. osp.json says for which scheme they are:
`{"tuning": {"scheme": …}}`. Rounding the tuned weights by them gives the codes that the model was tuned with; a search
would find others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from quant import arithmetic
from quant.format import CheckpointReader
from quant.llama import CheckpointError, LlamaConfig
from quant.scheme import LINEAR_SITES, SHARED_INPUTS, Scheme, SchemeError

SCALES_FILE = "scales.safetensors"

Scales = dict[str, NDArray[np.float32]]


def write_scales(root: Path, scales: Mapping[str, NDArray[np.float32]]) -> None:
    """Writes `scales.safetensors` into the checkpoint directory `root`.

    Raises:
        CheckpointError: a scale is not a positive, normal bfloat16 number held as float32.
    """
    for name, scale in scales.items():
        _check_values(root, name, scale)
    save_file({name: np.ascontiguousarray(scale) for name, scale in scales.items()}, root / SCALES_FILE)
    # safetensors lets only the owner read its files; a server often runs as another user.
    shutil.copymode(root / "config.json", root / SCALES_FILE)


def tuned_scheme(reader: CheckpointReader) -> Scheme | None:
    """The scheme that the checkpoint's scales are for; None where it has no `scales.safetensors`.

    Raises:
        CheckpointError: there are scales, but osp.json does not say for which scheme.
    """
    if not (reader.path / SCALES_FILE).exists():
        return None
    tuning = reader.provenance.get("tuning")
    content = tuning.get("scheme") if isinstance(tuning, dict) else None
    if not isinstance(content, dict):
        raise CheckpointError(
            reader.path,
            f"{SCALES_FILE} is there, but osp.json has no tuning.scheme that says what its scales are for; "
            "tune the model again, or remove the file to have scales searched",
        )
    try:
        scheme = Scheme.from_dict(content)
        reader.config.check_scheme(scheme)
    except SchemeError as error:
        raise CheckpointError(reader.path, f"osp.json: tuning.scheme: {error}") from None
    return scheme


def differing_settings(tuned: Scheme, scheme: Scheme) -> list[str]:
    """The settings that decide whether scales fit and that differ: those of every linear site of a block, the cache's
    bits and the rotation. Head and embedding may differ, for tuning leaves them as they are."""
    return [key for key in (*LINEAR_SITES, "kv_bits", "hadamard") if getattr(tuned, key) != getattr(scheme, key)]


def read_scales(reader: CheckpointReader, scheme: Scheme) -> Scales | None:
    """The learned scales, by tensor name, if they are for `scheme`; else None.

    Raises:
        CheckpointError: `scales.safetensors` is damaged, lacks a scale, holds another tensor, one of the wrong shape,
            type or value, or two input scales for one tensor; as `tuned_scheme`.
    """
    tuned = tuned_scheme(reader)
    if tuned is None or differing_settings(tuned, scheme):
        return None
    try:
        scales: Scales = load_file(reader.path / SCALES_FILE)
    except Exception as error:
        raise CheckpointError(reader.path, f"{SCALES_FILE} cannot be read: {error}") from error
    expected = _expected_shapes(reader.config, scheme)
    for name, shape in expected.items():
        if name not in scales:
            raise CheckpointError(reader.path, f"{SCALES_FILE}: {name} is missing")
        _check_values(reader.path, name, scales[name])
        if scales[name].shape != shape:
            raise CheckpointError(
                reader.path, f"{SCALES_FILE}: {name} has shape {list(scales[name].shape)}, expected {list(shape)}"
            )
    unexpected = sorted(set(scales) - set(expected))
    if unexpected:
        raise CheckpointError(reader.path, f"{SCALES_FILE}: unexpected tensors: {shortened(unexpected)}")
    _check_shared_inputs(reader, scales)
    return scales


def _check_shared_inputs(reader: CheckpointReader, scales: Scales) -> None:
    for layer in range(reader.config.num_hidden_layers):
        for sites in SHARED_INPUTS:
            names = [f"model.layers.{layer}.{LINEAR_SITES[site]}.input_scale" for site in sites]
            learned = {name: float(scales[name][0]) for name in names if name in scales}
            if len(set(learned.values())) > 1:
                raise CheckpointError(
                    reader.path, f"{SCALES_FILE}: {', '.join(learned)} are for one tensor and must be the same"
                )


def _expected_shapes(config: LlamaConfig, scheme: Scheme) -> dict[str, tuple[int]]:
    shapes: dict[str, tuple[int]] = {}
    for name, (rows, _) in config.linear_shapes().items():
        linear = scheme.linear(name)
        if linear.weight_bits < 16:
            shapes[f"{name}.weight_scale"] = (rows if linear.weight_granularity == "channel" else 1,)
        if linear.static:
            shapes[f"{name}.input_scale"] = (1,)
    return shapes


def _check_values(root: Path, name: str, scale: NDArray[np.float32]) -> None:
    if scale.dtype != np.float32:
        raise CheckpointError(root, f"{SCALES_FILE}: {name} is {scale.dtype}, not float32")
    with np.errstate(over="ignore", invalid="ignore"):
        normal = np.isfinite(scale) & (scale >= arithmetic.BFLOAT16_TINY)
        usable = normal & (arithmetic.round_to_bfloat16(scale) == scale)
    if not usable.all():
        raise CheckpointError(
            root, f"{SCALES_FILE}: {name} is not a positive, normal bfloat16 number: {scale[~usable].flat[0]}"
        )

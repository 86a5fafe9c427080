"""Rounds the weights of one layer, or of the tables, and says what was lost at every site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from quant.calibrate import Calibration, InputStatistics
from quant.gptq import NotPositiveDefiniteError, gptq
from quant.llama import EMBEDDING, HEAD
from quant.model import HadamardTransform, WeightSource
from quant.rounding import RoundedWeight, choose_scales, round_to_nearest
from quant.scheme import LINEAR_SITES, LinearScheme
from quant.tensors import Tensor
from quant.weights import QuantizedLinear, QuantizedWeight, stored_tensors

Part = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]
"""Tensors as they are stored, and the report of every site by module name."""


@dataclass(frozen=True, slots=True)
class LayerQuantizer:
    """Makes quantized layers from those of `source`.

    Attributes:
        calibration: the scheme and how its scales are found; with Hessians, weights of the blocks are rounded by GPTQ.
        progress: a bar over the sites of a layer, where rounding them takes a while.
    """

    source: WeightSource
    calibration: Calibration
    progress: bool = False

    def layer(self, index: int, seen: Mapping[str, InputStatistics]) -> Part:
        """A transformer block: its linear layers, quantized where the scheme says so, and its norms.

        Args:
            seen: the inputs by module name; those that are missing have no static scale.

        Raises:
            NonFiniteError: a weight is NaN or infinite; the message names it.
        """
        tensors: dict[str, Tensor] = {}
        sites: dict[str, dict[str, Any]] = {}
        names = [f"model.layers.{index}.{module}" for module in LINEAR_SITES.values()]
        shown = self.progress and self.calibration.hessians
        for name in tqdm(names, f"GPTQ in layer {index}", disable=None if shown else True, leave=False, position=1):
            weight_MK = self._float(name)
            linear = self.calibration.scheme.linear(name)
            if linear.weight_bits == 16:
                tensors |= stored_tensors(name, weight_MK)
                continue
            rotated = self.calibration.rotates(name)
            quantized, sites[name] = self._linear(
                name, rotate(weight_MK) if rotated else weight_MK, linear, seen.get(name), rotated
            )
            tensors |= stored_tensors(name, quantized)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{index}.{norm}"
            tensors |= stored_tensors(name, self.source.norm(f"{name}.weight"))
        return tensors, sites

    def tables(self, head_input: InputStatistics | None) -> Part:
        """Embedding, final norm and, unless it is tied, head; the rounding is to nearest, whatever the blocks have.

        Args:
            head_input: where the head has a static scale.
        """
        scheme, norm = self.calibration.scheme, self.calibration.clip.norm
        tensors = stored_tensors("model.norm", self.source.norm("model.norm.weight"))
        sites: dict[str, dict[str, Any]] = {}
        table_VD = self.source.embedding()
        assert not isinstance(table_VD, QuantizedWeight)  # the source has no scheme
        if scheme.embedding_bits == 16:
            tensors |= stored_tensors(EMBEDDING, table_VD)
        else:
            rounded = round_to_nearest(table_VD, f"{EMBEDDING}.weight", scheme.embedding_bits, "channel", norm)
            tensors |= stored_tensors(EMBEDDING, rounded.weight)
            sites[EMBEDDING] = site_report(rounded, "rtn", None)
        del table_VD
        if self.source.config.tie_word_embeddings:
            return tensors, sites
        weight_VD = self._float(HEAD)
        if scheme.head.weight_bits == 16:
            return tensors | stored_tensors(HEAD, weight_VD), sites
        head, sites[HEAD] = self._linear(HEAD, weight_VD, scheme.head, head_input, False)
        return tensors | stored_tensors(HEAD, head), sites

    def _float(self, name: str) -> NDArray[Any]:
        weight_MK = self.source.linear(name)
        assert not isinstance(weight_MK, QuantizedLinear)  # the source has no scheme
        return weight_MK

    def _linear(
        self, name: str, weight_MK: NDArray[Any], linear: LinearScheme, seen: InputStatistics | None, rotated: bool
    ) -> tuple[QuantizedLinear, dict[str, Any]]:
        rounded, method = self._round(name, weight_MK, linear, None if seen is None else seen.hessian)
        scale = None if seen is None else seen.scale
        return QuantizedLinear(rounded.weight, linear.activation_bits, scale, rotated), site_report(
            rounded, method, seen
        )

    def _round(
        self, name: str, weight_MK: NDArray[Any], linear: LinearScheme, hessian_KK: torch.Tensor | None
    ) -> tuple[RoundedWeight, str]:
        """The codes, and the method that found them: where GPTQ cannot, that is rounding to nearest."""
        bits, granularity, norm = linear.weight_bits, linear.weight_granularity, self.calibration.clip.norm
        scales = self.calibration.scales.get(f"{name}.weight_scale")
        if self.calibration.hessians and hessian_KK is not None:  # a head has none
            if scales is None:
                scales = choose_scales(weight_MK, f"{name}.weight", bits, granularity, norm)
            try:
                codes_MK = gptq(weight_MK, name, scales, bits, hessian_KK)
                return RoundedWeight.from_codes(weight_MK, codes_MK, scales, bits), "gptq"
            except NotPositiveDefiniteError:
                pass  # reported by its method
        return round_to_nearest(weight_MK, f"{name}.weight", bits, granularity, norm, scales), "rtn"


def rotate(weight_MK: NDArray[Any]) -> NDArray[np.float32]:
    """A weight whose input passes `Hadamard.of_width(K)`: computed in float64, rounded to float32 [M, K]."""
    transform = HadamardTransform(weight_MK.shape[1])
    rotated: NDArray[np.float32] = transform(torch.from_numpy(weight_MK.astype(np.float64))).float().numpy()
    return rotated


def site_report(rounded: RoundedWeight, method: str, seen: InputStatistics | None) -> dict[str, Any]:
    """What osp.json records of a site; what was not measured is None."""
    inputs = ("mse", "clip_ratio", "absmax", "excess_kurtosis", "rotated_excess_kurtosis")
    return {
        "method": method,
        "mse": rounded.mse,
        "clip_ratio": rounded.clip_ratio,
        "absmax": rounded.absmax,
        **{f"input_{key}": None if seen is None else getattr(seen, key) for key in inputs},
    }

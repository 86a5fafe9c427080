"""What quantization cost: the table of sites, perplexity before and after, and what to do where it is too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.llama import LlamaConfig
from quant.scheme import LINEAR_SITES, Scheme, SchemeError

OUTLIER_SAFE_RATIO = 1.5
"""A model whose perplexity grows by more than this factor is not outlier-safe, unless another limit is set."""

SITES_NAMED = 3
"""How many of the worst sites a warning names."""

COLUMNS = (
    ("weight", "mse", "mse", "9.2e"),
    ("weight", "clip", "clip_ratio", "6.3f"),
    ("weight", "absmax", "absmax", "9.4g"),
    ("input", "kurtosis", "input_excess_kurtosis", "9.2f"),
    ("input", "rotated", "input_rotated_excess_kurtosis", "9.2f"),
    ("input", "clip", "input_clip_ratio", "6.3f"),
    ("input", "absmax", "input_absmax", "9.4g"),
    ("input", "mse", "input_mse", "9.2e"),
)
"""Of the table: what it is of, its heading, its key in a site's report, its format. Columns without a value are left
out."""


class NotOutlierSafeError(ValueError):
    """Perplexity grew beyond the limit, and that was to be an error; the message has the ratio and what may help."""


def warning(
    scheme: Scheme,
    weights: str,
    config: LlamaConfig,
    sites: Mapping[str, Mapping[str, Any]],
    quality: Mapping[str, Any],
    max_ratio: float,
) -> str | None:
    """What to tell of a model that does not survive its quantization; None where it does.

    Args:
        weights: "rtn" or "gptq".
        config: of the model.
        quality: "perplexity" is None where it is not finite.
        max_ratio: by which perplexity may grow.
    """
    ratio = quality["ratio"]
    if ratio is not None and ratio <= max_ratio:
        return None
    after = (
        "no finite number" if ratio is None else f"{quality['perplexity']:.4g} (x {ratio:.4g}, allowed {max_ratio:g})"
    )
    sentences = [
        f"this model is not outlier-safe: {scheme.label} takes its perplexity from {quality['perplexity_16bit']:.4g} "
        f"to {after}"
    ]
    worst = sorted(
        (site["input_excess_kurtosis"], name)
        for name, site in sites.items()
        if site["input_excess_kurtosis"] is not None
    )[: -SITES_NAMED - 1 : -1]
    if worst:
        listed = ", ".join(f"{name} ({kurtosis:.4g})" for kurtosis, name in worst)
        sentences.append(f"the heaviest tails, by excess kurtosis, are in the inputs of {listed}")
    option = next_option(scheme, weights, config)
    if option is not None:
        sentences.append(f"try {option}")
    sentences.append("a model that can be trained can be tuned for its scheme")
    return "; ".join(sentences)


def next_option(scheme: Scheme, weights: str, config: LlamaConfig) -> str | None:
    """The option that costs least among those that would help a model with outliers further, and that a model of this
    shape can have; None where no option is left."""
    linears = [getattr(scheme, site) for site in LINEAR_SITES]
    activation_bits = min(linear.activation_bits for linear in linears)
    if activation_bits < 16 and scheme.hadamard == "none":
        rotations = ["ffn", "full"] if scheme.down.activation_bits < 16 else ["full"]  # "ffn" is of down's input
        fitting = [f"--hadamard {rotation}" for rotation in rotations if _fits(config, scheme, rotation)]
        if fitting:
            return " or ".join(fitting)
    if activation_bits == 4 and any(linear.static for linear in linears):
        return "--scheme w4a4-token"
    if activation_bits == 4:
        return "--scheme w4a8"
    if activation_bits == 8:
        return "--scheme w4a16"
    weight_bits = min(linear.weight_bits for linear in linears)
    if weight_bits < 16 and weights == "rtn":
        return "--weights gptq"
    if weight_bits == 4:
        return "weights of 8 bits"
    # Together: the head and the embedding may be one table, which has one number of bits.
    rest = {"--kv": scheme.kv_bits, "--head": scheme.head.weight_bits, "--embedding": scheme.embedding_bits}
    return " ".join(f"{option} 8" for option, bits in rest.items() if bits == 4) or None


def _fits(config: LlamaConfig, scheme: Scheme, hadamard: str) -> bool:
    """Can a model of this shape be rotated so?"""
    try:
        config.check_scheme(scheme.changed(hadamard=hadamard))
    except SchemeError:
        return False
    return True


def table(report: Mapping[str, Any]) -> str:
    """A line for every site, then the bytes and how good the checkpoint is."""
    quantization, quality = report["quantization"], report["quality"]
    sites = quantization["sites"]
    columns = [column for column in COLUMNS if any(site[column[2]] is not None for site in sites.values())]
    width = max((len(name) for name in sites), default=0)
    lines = [
        _row(
            "",
            width,
            [(of if i == 0 or columns[i - 1][0] != of else "", form) for i, (of, _, _, form) in enumerate(columns)],
        )
    ]
    lines.append(_row("site", width, [(heading, form) for _, heading, _, form in columns]))
    for name, site in sites.items():
        cells = [("" if site[key] is None else format(site[key], form), form) for _, _, key, form in columns]
        lines.append(_row(name, width, cells))
    lines.append("")
    calibration = quantization["calibration"]
    if calibration:
        cut = "; --calibration-tokens has cut the text" if calibration["cut"] else ""
        lines.append(f"calibrated on {calibration['tokens']:,} tokens ({_named(calibration['text'])}{cut})")
    after = "not finite" if quality["perplexity"] is None else f"{quality['perplexity']:.4g} (x {quality['ratio']:.5g})"
    lines.append(
        f"perplexity {quality['perplexity_16bit']:.4g} -> {after} on {quality['tokens']:,} tokens "
        f"({_named(quality['text'])})"
    )
    sizes = ", ".join(f"{part} {size:,}" for part, size in quantization["bytes"].items())
    lines.append(f"bytes: {sizes}")
    return "\n".join(lines)


def _row(name: str, width: int, cells: list[tuple[str, str]]) -> str:
    return "  ".join([f"{name:{width}}", *(f"{text:>{form.split('.')[0]}}" for text, form in cells)]).rstrip()


def _named(text: str | list[str]) -> str:
    return text if isinstance(text, str) else ", ".join(text)

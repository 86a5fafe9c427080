"""What a user is told: the worst sites, the next option, the table; and how the clip setting reads."""

from __future__ import annotations

import pytest
from checkpoints import BASE

from quant.clip import ClipSearch
from quant.llama import LlamaConfig
from quant.report import next_option, table, warning
from quant.scheme import LINEAR_SITES, named

W4A4 = named("w4a4")
SIXTEEN = {"weight_bits": 16, "activation_bits": 16}
BODY_LEFT = W4A4.changed(kv_bits=8, **dict.fromkeys(LINEAR_SITES, SIXTEEN))
EVEN = LlamaConfig.from_json("m", BASE)


def site(kurtosis, **values):
    keys = ("clip_ratio", "absmax", "mse", "rotated_excess_kurtosis")
    inputs = {f"input_{key}": None for key in keys} | {"input_excess_kurtosis": kurtosis}
    return {"method": "rtn", "mse": 1e-4, "clip_ratio": 0.5, "absmax": 2.0, **inputs, **values}


def quality(before, after):
    return {
        "perplexity_16bit": before,
        "perplexity": after,
        "ratio": after and after / before,
        "tokens": 1234,
        "text": ["a.txt", "b.md"],
    }


SITES = {f"site{i}": site(kurtosis) for i, kurtosis in enumerate((3.0, 500.0, None, 40.0, 0.5, 41.0))}


def test_a_warning_names_the_ratio_and_the_worst_sites():
    told = warning(W4A4.changed(kv_bits=4), "rtn", EVEN, SITES, quality(20.0, 130.0), 1.5)
    assert told.startswith(
        "this model is not outlier-safe: w4a4-kv4 takes its perplexity from 20 to 130 (x 6.5, allowed"
    )
    assert "inputs of site1 (500), site5 (41), site3 (40); try --hadamard" in told
    assert "can be tuned" in told


def test_there_is_no_warning_within_the_limit():
    assert warning(W4A4, "rtn", EVEN, SITES, quality(20.0, 30.0), 1.5) is None
    assert warning(W4A4, "rtn", EVEN, SITES, quality(20.0, 30.1), 1.5)
    assert warning(W4A4, "rtn", EVEN, SITES, quality(20.0, 30.1), 2.0) is None


def test_no_finite_perplexity_is_warned_of_whatever_the_limit():
    told = warning(W4A4, "rtn", EVEN, {"a": site(None)}, quality(20.0, None), 1e9)
    assert "from 20 to no finite number; try" in told


@pytest.mark.parametrize(
    ("scheme", "weights", "wanted"),
    [
        (W4A4, "rtn", "--hadamard ffn or --hadamard full"),
        (named("w4a8"), "gptq", "--hadamard ffn or --hadamard full"),
        (W4A4.changed(hadamard="ffn"), "rtn", "--scheme w4a4-token"),
        (named("w4a4-token").changed(hadamard="full"), "rtn", "--scheme w4a8"),
        (named("w4a8").changed(hadamard="ffn"), "rtn", "--scheme w4a16"),
        (named("w4a16"), "rtn", "--weights gptq"),
        (named("w4a16"), "gptq", "weights of 8 bits"),
        (W4A4.changed(down=SIXTEEN), "rtn", "--hadamard full"),
        (BODY_LEFT.changed(kv_bits=4), "rtn", "--kv 8"),
        (BODY_LEFT.changed(kv_bits=4, head=4, embedding_bits=4), "rtn", "--kv 8 --head 8 --embedding 8"),
        (BODY_LEFT.changed(kv_bits=8, embedding_bits=4), "gptq", "--embedding 8"),
        (BODY_LEFT.changed(kv_bits=8), "rtn", None),
    ],
)
def test_the_next_option_is_one_that_is_not_taken_yet(scheme, weights, wanted):
    assert next_option(scheme, weights, EVEN) == wanted


@pytest.mark.parametrize(
    ("scheme", "shape", "wanted"),
    [
        (W4A4, {"intermediate_size": 81}, "--scheme w4a4-token"),
        (named("w4a8"), {"intermediate_size": 81}, "--scheme w4a16"),
        (W4A4, {"hidden_size": 39, "head_dim": 8}, "--hadamard ffn"),
        (W4A4.changed(down=SIXTEEN), {"hidden_size": 39, "head_dim": 8}, "--scheme w4a4-token"),
    ],
)
def test_an_option_that_the_model_cannot_have_is_not_named(scheme, shape, wanted):
    assert next_option(scheme, "rtn", LlamaConfig.from_json("m", {**BASE, **shape})) == wanted


def test_where_no_option_is_left_none_is_named():
    told = warning(BODY_LEFT.changed(kv_bits=8), "rtn", EVEN, {}, quality(20.0, 130.0), 1.5)
    assert told.endswith("(x 6.5, allowed 1.5); a model that can be trained can be tuned for its scheme")


def report(sites, calibration=None, after=25.0):
    quantization = {"sites": sites, "calibration": calibration, "bytes": {"body": 1_000_000, "head": 5}}
    return {"quantization": quantization, "quality": quality(20.0, after)}


def test_columns_without_a_value_are_left_out():
    plain = table(report({"a.b": site(None)})).splitlines()
    assert plain[0].split() == ["weight"]
    assert plain[1].split() == ["site", "mse", "clip", "absmax"]
    assert plain[2].split() == ["a.b", "1.00e-04", "0.500", "2"]
    rotated = site(108.3, input_rotated_excess_kurtosis=0.25, input_clip_ratio=0.6, input_absmax=5.0, input_mse=0.01)
    full = table(report({"a": site(0.1), "down": rotated})).splitlines()
    assert full[0].split() == ["weight", "input"]
    assert full[1].split() == ["site", "mse", "clip", "absmax", "kurtosis", "rotated", "clip", "absmax", "mse"]
    assert full[2].split() == ["a", "1.00e-04", "0.500", "2", "0.10"]
    assert full[3].split() == ["down", "1.00e-04", "0.500", "2", "108.30", "0.25", "0.600", "5", "1.00e-02"]
    # Each value stands below its heading.
    assert full[1].index("rotated") + len("rotated") == full[3].index("0.25") + len("0.25")


def test_the_end_says_how_good_and_how_large():
    calibration = {"text": "bundled", "tokens": 65_536, "cut": True}
    lines = table(report({"a": site(1.0)}, calibration)).splitlines()
    assert lines[-3:] == [
        "calibrated on 65,536 tokens (bundled; --calibration-tokens has cut the text)",
        "perplexity 20 -> 25 (x 1.25) on 1,234 tokens (a.txt, b.md)",
        "bytes: body 1,000,000, head 5",
    ]
    assert "perplexity 20 -> not finite on" in table(report({"a": site(1.0)}, after=None))


@pytest.mark.parametrize("text", ["mse", "p2.4", "99.99", "100", "50", "99.99995"])
def test_a_clip_setting_reads_as_it_is_written(text):
    assert str(ClipSearch.parse(text)) == text


def test_clip_settings():
    assert ClipSearch.parse("mse") == ClipSearch.parse("p2") == ClipSearch() == ClipSearch(norm=2.0, percentile=None)
    assert ClipSearch.parse("p2.4") == ClipSearch(norm=2.4)
    assert ClipSearch.parse("99.5") == ClipSearch(percentile=99.5)
    for text in ("", "p", "rms", "p1.9", "pinf", "pnan", "0", "-1", "100.1", "nan", "inf", "p2.4.1"):
        with pytest.raises(ValueError, match=r"neither mse|at least 2|above 0"):
            ClipSearch.parse(text)

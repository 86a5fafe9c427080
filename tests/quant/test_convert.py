"""The pipeline end to end on tiny models: every shape, every scheme, what is written and what is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from quant import arithmetic, convert
from quant.calibrate import Calibration
from quant.clip import ClipSearch
from quant.convert import quantize_checkpoint
from quant.format import CheckpointReader, read_checkpoint, sha256, write_json
from quant.llama import EMBEDDING, HEAD, CheckpointError
from quant.model import build_block, load_model
from quant.perplexity import measure_perplexity
from quant.rotation import RotatedSource
from quant.scheme import Scheme, SchemeError, named
from quant.stream import HiddenStates
from quant.text import windows
from quant.weights import QuantizedLinear

W4A4 = named("w4a4")
EVEN = {"intermediate_size": 40}
SHAPES = {
    "own head, grouped queries, odd width": {},
    "tied": {"tie_word_embeddings": True},
    "one query head a key head": {"num_key_value_heads": 4},
    "float16": {"dtype": torch.float16},
    "float32, sharded": {"dtype": torch.float32, "max_shard_size": "8KB"},
    "smallest": {
        "hidden_size": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": 1,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_checkpoint_of_any_shape_becomes_four_bit(make_checkpoint, text_path, tmp_path, shape):
    path = make_checkpoint(**shape)
    report = quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    source, written = read_checkpoint(path), read_checkpoint(tmp_path / "out")
    assert written.scheme == W4A4
    assert written.config == source.config
    assert written.provenance == report
    assert report["quantization"]["sites"].keys() == source.linears.keys()

    for name, weight in source.linears.items():
        linear, site = written.linears[name], report["quantization"]["sites"][name]
        scale = linear.weight.scale
        np.testing.assert_array_equal(linear.weight.codes, arithmetic.quantize(weight, scale))
        errors = weight.astype(np.float64) - linear.weight.codes * np.float64(scale)
        assert site["mse"] == pytest.approx(np.square(errors).mean())
        assert site["clip_ratio"] == pytest.approx(7 * scale[0] / site["absmax"])
        assert site["absmax"] == np.abs(weight).max()
        assert site["input_clip_ratio"] == pytest.approx(7 * linear.input_scale / site["input_absmax"])
    tables = ((written.embedding, source.embedding), (written.head, source.head))
    for values, wanted in (*tables, *((written.norms[name], source.norms[name]) for name in source.norms)):
        np.testing.assert_array_equal(values, wanted.astype(values.dtype))


SIXTEEN = {"weight_bits": 16, "activation_bits": 16}
SCHEMES = {
    "w4a4-token, kv 4": ("w4a4-token", {"kv_bits": 4}),
    "w4a8, kv 8, head and embedding 8": ("w4a8", {"kv_bits": 8, "head": 8, "embedding_bits": 8}),
    "w4a16, head and embedding 4": ("w4a16", {"head": 4, "embedding_bits": 4}),
    "rotated feed-forward": ("w4a4", {"hadamard": "ffn"}),
    "rotated, unquantized inputs": ("w4a16", {"hadamard": "ffn"}),
    "rotated, down left alone": ("w4a4", {"hadamard": "ffn", "down": SIXTEEN}),
    "all rotated": ("w4a4", {"hadamard": "full", "kv_bits": 4}),
    "mixed sites": (
        "w4a4",
        {"down": {"weight_bits": 8, "activation_bits": 8}, "o": SIXTEEN, "k": {"activation_bits": 16}},
    ),
    "static head": ("w4a4", {"head": {"activation_granularity": "tensor", "weight_granularity": "tensor"}}),
    "nothing but the head": ("w4a4", {**dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), SIXTEEN), "head": 8}),
}


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
@pytest.mark.parametrize(("name", "changes"), SCHEMES.values(), ids=SCHEMES.keys())
def test_every_scheme_is_written_and_runs(make_checkpoint, text_path, tmp_path, name, changes, weights):
    scheme, path = named(name).changed(**changes), make_checkpoint(**EVEN)
    report = quantize_checkpoint(path, tmp_path / "out", scheme, calibration=[text_path], weights=weights, max_ratio=9)
    written = read_checkpoint(tmp_path / "out")
    assert written.scheme == scheme
    assert report["quantization"]["scheme"] == written.precision == scheme.label
    for module, linear in {**written.linears, HEAD: written.head}.items():
        wanted, site = scheme.linear(module), report["quantization"]["sites"].get(module)
        assert (site is not None) == isinstance(linear, QuantizedLinear) == (wanted.weight_bits < 16)
        if site:
            assert linear.weight.bits == wanted.weight_bits
            assert linear.rotated == (module.endswith("down_proj") and scheme.hadamard != "none")
            assert (linear.input_scale is not None) == (site["input_clip_ratio"] is not None) == wanted.static
            assert site["method"] == ("rtn" if module == HEAD else weights)
    assert (EMBEDDING in report["quantization"]["sites"]) == (scheme.embedding_bits < 16)
    # The quantized model is the source up to its rounding, whatever was rotated.
    assert 0.9 < report["quality"]["ratio"] < 2
    assert report["warning"] is None


def test_a_full_rotation_is_of_the_rotated_source(make_checkpoint, text_path, tmp_path):
    path, scheme = make_checkpoint(tie_word_embeddings=True, **EVEN), named("w4a8").changed(hadamard="full")
    quantize_checkpoint(path, tmp_path / "out", scheme, calibration=[text_path])
    written, rotated = read_checkpoint(tmp_path / "out"), RotatedSource(CheckpointReader(path))
    assert not written.config.tie_word_embeddings
    for name, linear in written.linears.items():
        if not name.endswith("down_proj"):
            np.testing.assert_array_equal(
                linear.weight.codes, arithmetic.quantize(rotated.linear(name), linear.weight.scale)
            )
    np.testing.assert_array_equal(written.head, rotated.head().astype(written.head.dtype))
    assert all((norm == 1).all() for norm in written.norms.values())


def test_nothing_is_calibrated_where_no_input_matters(checkpoint_path, text_path, tmp_path, monkeypatch):
    monkeypatch.setattr("quant.convert.HiddenStates", None)  # to run a text would fail
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", named("w4a16"), heldout=[text_path])
    assert report["quantization"]["calibration"] is None
    assert {site["input_excess_kurtosis"] for site in report["quantization"]["sites"].values()} == {None}


def test_the_report_says_what_was_done(checkpoint_path, text_path, tmp_path):
    training, tuning = {"recipe": "osp", "tokens": 123}, {"steps": 5}
    write_json(checkpoint_path / "osp.json", {"training": training, "tuning": tuning, "unrelated": 1})
    report = quantize_checkpoint(
        checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path], clip=ClipSearch(norm=2.4)
    )
    text = text_path.read_text()
    calibrated = len(text) - len(text) // 5
    scored = sum(len(text[calibrated:][i : i + 32]) - 1 for i in range(0, len(text) - calibrated, 32))
    assert (report["training"], report["tuning"]) == (training, tuning)
    assert "unrelated" not in report
    assert report["tokenizer_sha256"] == sha256(checkpoint_path / "tokenizer.json")
    quantization = report["quantization"]
    assert [quantization[key] for key in ("scheme", "weights", "clip", "scales")] == ["w4a4", "rtn", "p2.4", "searched"]
    assert Scheme.from_dict(quantization["settings"]) == W4A4
    assert quantization["calibration"] == {
        "text": ["text.txt"],
        "sha256": sha256(text_path),
        "tokens": calibrated,
        "cut": False,
    }
    quality = report["quality"]
    assert (quality["text"], quality["sha256"]) == ("held back from calibration", sha256(text_path))
    assert quality["tokens"] == scored
    assert quality["ratio"] == quality["perplexity"] / quality["perplexity_16bit"]


def test_bytes_add_up_to_those_of_the_file(checkpoint_path, text_path, tmp_path):
    scheme = named("w4a4").changed(head=8)
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", scheme, calibration=[text_path])
    stored = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "out" / "osp.safetensors").items()}
    sizes = report["quantization"]["bytes"]
    assert sum(sizes.values()) == sum(stored.values())
    assert sizes["head"] == 260 * (24 + 4)
    assert sizes["embedding"] == 260 * 24 * 2
    assert sizes["norms"] == 5 * 24 * 2


def test_held_back_text_is_not_calibrated_on(checkpoint_path, text_path, tmp_path, tokenizer):
    text_path.write_text("abcd" * 60 + "XYZ!" * 15)
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path])
    source, plan = CheckpointReader(checkpoint_path), Calibration(W4A4, ClipSearch())
    hidden = HiddenStates(source, list(windows([tokenizer.encode("abcd" * 60).ids], 32)))
    for layer in range(2):
        for name, seen in plan.observe_block(hidden, build_block(source, hidden.config, layer), layer).items():
            assert report["quantization"]["sites"][name]["input_absmax"] == seen.absmax
    held = list(windows([tokenizer.encode("XYZ!" * 15).ids], 32))
    assert report["quality"]["perplexity_16bit"] == measure_perplexity(source, held).value
    assert report["quality"]["perplexity"] == measure_perplexity(CheckpointReader(tmp_path / "out"), held).value


def test_calibration_has_enough_at_some_point(checkpoint_path, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x" * 100)
    texts = [tmp_path / f"{name}.txt" for name in "abc"]
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=texts, calibration_tokens=150)
    assert report["quantization"]["calibration"]["tokens"] == 150 - 30
    assert report["quantization"]["calibration"]["cut"]
    assert report["quality"]["tokens"] == 29  # a window of 30


def test_calibration_windows_have_a_limit_of_their_own(checkpoint_path, text_path, tmp_path, monkeypatch):
    lengths, begin = [], HiddenStates.__init__

    def recording(self, source, cut):
        lengths.append({len(window) for window in cut})
        begin(self, source, cut)

    monkeypatch.setattr(convert, "CALIBRATION_WINDOW", 8)
    monkeypatch.setattr(HiddenStates, "__init__", recording)
    quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path], heldout=[text_path])
    assert lengths[0] == {8}
    assert min(max(later) for later in lengths[1:]) > 8  # quality is measured over the whole context


def test_text_to_evaluate_on_leaves_calibration_whole(checkpoint_path, text_path, tmp_path):
    other = tmp_path / "other.md"
    other.write_text("Something else entirely.")
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path], heldout=[other])
    assert report["quantization"]["calibration"]["tokens"] == len(text_path.read_text())
    quality = report["quality"]
    assert (quality["text"], quality["sha256"], quality["tokens"]) == (["other.md"], sha256(other), 23)


def test_text_is_not_cut_by_what_the_tokenizer_file_asks_for(checkpoint_path, text_path, tmp_path, tokenizer):
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(checkpoint_path / "tokenizer.json"))
    report = quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path], heldout=[text_path])
    length = len(text_path.read_text())
    assert report["quantization"]["calibration"]["tokens"] == length
    assert report["quality"]["tokens"] == length - -(-length // 32)


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_the_same_input_gives_the_same_bytes(checkpoint_path, text_path, tmp_path, weights):
    for name in ("one", "two"):
        quantize_checkpoint(checkpoint_path, tmp_path / name, W4A4, calibration=[text_path], weights=weights)
    for file in ("osp.safetensors", "osp.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_a_server_needs_is_copied(checkpoint_path, text_path, tmp_path):
    (checkpoint_path / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint_path / "notes.txt").write_text("private")
    quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, calibration=[text_path])
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint_path / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()


def test_what_cannot_be_quantized_is_refused(checkpoint_path, tmp_path):
    with pytest.raises(SchemeError, match="width 41 is odd"):
        quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4.changed(hadamard="ffn"))
    with pytest.raises(ValueError, match="'awq' is no way to round weights"):
        quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4, weights="awq")
    tokenizer = json.loads((checkpoint_path / "tokenizer.json").read_text())
    write_json(checkpoint_path / "tokenizer.json", tokenizer | {"pre_tokenizer": {"type": "Unheard"}})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        quantize_checkpoint(checkpoint_path, tmp_path / "out", W4A4)


def test_quality_is_the_loss_of_whole_models(make_checkpoint, text_path, tmp_path, tokenizer):
    scheme, path = named("w4a4-token").changed(kv_bits=4, hadamard="ffn", head=4), make_checkpoint(**EVEN)
    held = tmp_path / "held.txt"
    held.write_text("The lazy dog sleeps all day.")
    report = quantize_checkpoint(path, tmp_path / "out", scheme, calibration=[text_path], heldout=[held])
    ids = torch.tensor([tokenizer.encode(held.read_text()).ids])
    models = {
        "perplexity_16bit": LlamaForCausalLM.from_pretrained(path, dtype=torch.float32),
        "perplexity": load_model(CheckpointReader(tmp_path / "out")),
    }
    for key, model in models.items():
        with torch.no_grad():
            assert report["quality"][key] == pytest.approx(model(ids, labels=ids).loss.exp().item(), rel=1e-5)

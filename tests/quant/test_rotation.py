"""A rotated model computes what the original does: transformers' own Llama in float64 is the judge."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import ODD_WIDTHS, write_4bit, write_full_precision
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quant.format import CheckpointReader
from quant.hadamard import Hadamard
from quant.llama import EMBEDDING, HEAD, CheckpointError
from quant.rotation import RotatedSource

IDS = torch.arange(24)[None] * 7 % 83


def float64_model(source):
    """transformers' model with the weights of a source. Its norms and eager attention compute in float32 whatever their
    input; torch's do not."""
    fields = json.loads((source.path / "config.json").read_text())
    fields["tie_word_embeddings"] = source.config.tie_word_embeddings
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields, attn_implementation="sdpa"))
    for name, norm in [*model.named_modules()]:
        if isinstance(norm, LlamaRMSNorm):
            model.set_submodule(name, torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
    linears = {f"{name}.weight": source.linear(name) for name in source.config.linear_shapes()}
    tables = {f"{EMBEDDING}.weight": source.embedding(), f"{HEAD}.weight": source.head()}
    norms = {name: source.norm(name) for name in source.config.norm_names()}
    state = {name: torch.from_numpy(np.asarray(w, np.float64)) for name, w in (linears | tables | norms).items()}
    model.double().load_state_dict(state, strict=True)
    return model


def logits(source):
    with torch.no_grad():
        return float64_model(source)(IDS).logits.numpy()


SHAPES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "one query head a key head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    # 36 and 12 have odd parts with matrices; a head's width of 6 does not, and the heads are narrower than the stream.
    "odd parts": {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"head_dim": 6, "vocab_size": 83},
    "odd parts, tied": {"hidden_size": 36, "intermediate_size": 41, "head_dim": 12, "tie_word_embeddings": True},
}


def test_the_judge_computes_what_transformers_computes(tmp_path):
    path = write_full_precision(tmp_path)
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)(IDS).logits.numpy()
    np.testing.assert_allclose(logits(CheckpointReader(path)), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotated_model_computes_the_same(tmp_path, shape, seed):
    reader = CheckpointReader(write_full_precision(tmp_path, **SHAPES[shape]))
    rotated = RotatedSource(reader, seed, np.float64)
    assert not rotated.config.tie_word_embeddings
    before, after = logits(reader), logits(rotated)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-9 * np.abs(before).max())
    for norm in reader.config.norm_names():
        assert (reader.norm(norm) != 1).any()  # there was something to fold
        assert (rotated.norm(norm) == 1).all()


def test_hidden_states_are_those_of_the_original_rotated(tmp_path):
    reader = CheckpointReader(write_full_precision(tmp_path))
    rotated = RotatedSource(reader, dtype=np.float64)
    with torch.no_grad():
        states, turned = (
            float64_model(source)(IDS, output_hidden_states=True).hidden_states[1][0].numpy()
            for source in (reader, rotated)
        )
    rotation_DD, *_ = np.linalg.lstsq(states, turned, rcond=None)
    np.testing.assert_allclose(states @ rotation_DD, turned, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(states, axis=1), np.linalg.norm(turned, axis=1), rtol=1e-12)


def test_value_heads_are_rotated_each_for_itself(tmp_path):
    """Were they not, the logits would be the same as well: what o_proj reads is rotated back either way."""
    reader = CheckpointReader(write_full_precision(tmp_path))
    width, head = reader.config.hidden_size, Hadamard.of_width(8)
    seen = {}
    for source in (reader, RotatedSource(reader, dtype=np.float64)):
        model = float64_model(source)
        attention = model.model.layers[0].self_attn
        attention.o_proj.register_forward_pre_hook(lambda _, inputs, source=source: seen.update({source: inputs[0]}))
        with torch.no_grad():
            model(IDS)
    plain, turned = (mixed[0].numpy().reshape(-1, width // 8, 8) for mixed in seen.values())
    np.testing.assert_allclose(turned, head.apply(plain), atol=1e-12)


def test_an_outlier_channel_is_spread(tmp_path):
    path = write_full_precision(tmp_path)
    reader = CheckpointReader(path)
    table = reader.embedding()
    table[:, 5] = 100
    reader.embedding = lambda: table
    spread = RotatedSource(reader).embedding()
    assert spread.dtype == np.float32
    assert np.abs(table).max() / np.abs(table).mean() > 25
    assert np.abs(spread).max() / np.abs(spread).mean() < 1.5
    np.testing.assert_allclose(np.linalg.norm(spread, axis=1), np.linalg.norm(table, axis=1), rtol=1e-6)


def test_weights_are_rounded_once_to_the_type_asked_for(tmp_path):
    reader = CheckpointReader(write_full_precision(tmp_path))
    exact, rounded = RotatedSource(reader, dtype=np.float64), RotatedSource(reader)
    for name in [*reader.config.linear_shapes(), HEAD]:
        weight = rounded.linear(name)
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous
        np.testing.assert_array_equal(weight, exact.linear(name).astype(np.float32))


def test_the_seed_is_the_rotation(tmp_path):
    reader = CheckpointReader(write_full_precision(tmp_path))
    tables = [RotatedSource(reader, seed).embedding() for seed in (0, 0, 1)]
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()


def test_what_cannot_be_rotated_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is quantized already \(w4a4\)"):
        RotatedSource(CheckpointReader(write_4bit(tmp_path / "w4a4")))
    odd = write_full_precision(tmp_path / "odd", **ODD_WIDTHS)
    with pytest.raises(CheckpointError, match="odd width, 39"):
        RotatedSource(CheckpointReader(odd))

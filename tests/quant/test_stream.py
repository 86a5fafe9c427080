"""Streaming a block at a time against transformers' whole model, and what is in memory meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import write_4bit, write_full_precision
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quant import stream
from quant.format import CheckpointReader
from quant.model import build_block, load_model
from quant.perplexity import measure_perplexity
from quant.scheme import named
from quant.stream import HiddenStates, log_likelihoods

LENGTHS = (32, 2, 7, 32)
WINDOWS = [[int(i) for i in np.random.default_rng(n).integers(0, 256, length)] for n, length in enumerate(LENGTHS)]

SHAPES = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "float32": {"dtype": torch.float32},
    "theta and head width of its own": {"head_dim": 10, "rope_theta": 500.0},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_log_likelihoods_are_those_of_transformers(make_checkpoint, shape):
    path = make_checkpoint(**shape)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    scores = log_likelihoods(CheckpointReader(path), WINDOWS)
    assert [len(score) for score in scores] == [length - 1 for length in LENGTHS]
    for score, window in zip(scores, WINDOWS, strict=True):
        with torch.no_grad():
            log_probabilities = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        wanted = log_probabilities[torch.arange(len(window) - 1), window[1:]].numpy()
        np.testing.assert_allclose(score, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 1},
        {"dtype": "nonsense"},
        {"pad_token_id": "x"},
        {"use_cache": 3},
        {"initializer_range": "wide"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_only_transformers_refuses_do_not_matter(make_checkpoint, edit_config, fields):
    wanted = log_likelihoods(
        CheckpointReader(make_checkpoint(rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)))), WINDOWS
    )
    path = make_checkpoint("edited")
    edit_config(path, **fields)
    with pytest.raises(Exception, match="|".join(map(str, [*fields, *fields.values()]))):
        LlamaForCausalLM.from_pretrained(path)
    for scores, expected in zip(log_likelihoods(CheckpointReader(path), WINDOWS), wanted, strict=True):
        np.testing.assert_array_equal(scores, expected)


def test_a_width_may_be_no_multiple_of_the_heads(tmp_path):
    shape = {"hidden_size": 26, "head_dim": 6}
    reader = CheckpointReader(write_full_precision(tmp_path / "source", **shape))
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        LlamaForCausalLM.from_pretrained(reader.path)
    with torch.no_grad():
        log_probabilities = load_model(reader)(torch.tensor([[1, 2, 3]])).logits[0].log_softmax(-1)
    wanted = log_probabilities[[0, 1], [2, 3]].numpy()
    np.testing.assert_allclose(log_likelihoods(reader, [[1, 2, 3]])[0], wanted, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-token", "w4a8", "w4a16"])
def test_a_quantized_model_streams_as_it_runs_whole(tmp_path, scheme):
    changed = named(scheme).changed(kv_bits=4, hadamard="ffn", head=8, embedding_bits=4)
    reader = CheckpointReader(write_4bit(tmp_path / "packed", scheme=changed))
    window = [int(i) for i in np.random.default_rng(5).integers(0, 97, 40)]
    with torch.no_grad():
        log_probabilities = load_model(reader)(torch.tensor([window])).logits[0].log_softmax(-1)
    wanted = log_probabilities[torch.arange(39), window[1:]].numpy()
    np.testing.assert_allclose(log_likelihoods(reader, [window])[0], wanted, atol=1e-5)


def test_perplexity_is_the_exponential_of_transformers_loss(checkpoint_path):
    model = LlamaForCausalLM.from_pretrained(checkpoint_path, dtype=torch.float32)
    ids = torch.tensor([WINDOWS[0]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    measured = measure_perplexity(CheckpointReader(checkpoint_path), WINDOWS[:1])
    assert measured.value == pytest.approx(np.exp(loss), rel=1e-5)
    assert measured.tokens == 31


def test_every_scored_token_counts_the_same(checkpoint_path):
    reader = CheckpointReader(checkpoint_path)
    together = measure_perplexity(reader, WINDOWS)
    apart = np.concatenate([log_likelihoods(reader, [window])[0] for window in WINDOWS])
    assert together.tokens == len(apart) == sum(LENGTHS) - len(LENGTHS)
    assert together.value == pytest.approx(np.exp(-apart.mean()), rel=1e-6)
    with pytest.raises(ValueError, match="at least one window"):
        measure_perplexity(reader, [])


def test_how_many_logits_are_held_changes_nothing(checkpoint_path, monkeypatch):
    reader = CheckpointReader(checkpoint_path)
    whole = log_likelihoods(reader, WINDOWS)
    monkeypatch.setattr(stream, "LOGIT_ROWS", 3)
    for parts, wanted in zip(log_likelihoods(reader, WINDOWS), whole, strict=True):
        np.testing.assert_allclose(parts, wanted, atol=1e-6)


def test_how_many_windows_are_held_changes_nothing(checkpoint_path, monkeypatch):
    held, begin = [], HiddenStates.__init__

    def recording(self, source, windows):
        held.append([len(window) for window in windows])
        begin(self, source, windows)

    monkeypatch.setattr(HiddenStates, "__init__", recording)
    reader = CheckpointReader(checkpoint_path)
    windows = [*WINDOWS, [*WINDOWS[0][:-1], 5]]  # the last is run together with the first
    whole = log_likelihoods(reader, windows)
    monkeypatch.setattr(stream, "GROUP_TOKENS", 32)
    grouped = log_likelihoods(reader, windows)
    monkeypatch.setattr(stream, "GROUP_TOKENS", 1)
    apart = log_likelihoods(reader, windows)
    assert held == [[31, 1, 6, 31], [31, 1], [6], [31], [31], [1], [6], [31]]
    for i, wanted in enumerate(whole):
        np.testing.assert_array_equal(grouped[i], wanted)
        np.testing.assert_array_equal(apart[i], wanted)


def test_outputs_leave_the_states_and_advance_moves_them(checkpoint_path):
    reader = CheckpointReader(checkpoint_path)
    hidden = HiddenStates(reader, WINDOWS)
    block, before = build_block(reader, hidden.config, 0), [state.clone() for state in hidden.states]
    rotary = LlamaRotaryEmbedding(hidden.config)
    with torch.inference_mode():
        outputs = [
            block(state[None], position_embeddings=rotary(state[None], torch.arange(len(state))[None]))[0]
            for state in hidden.states
        ]
    assert all(torch.equal(state, kept) for state, kept in zip(hidden.states, before, strict=True))
    hidden.advance(block)
    assert all(torch.equal(state, output) for state, output in zip(hidden.states, outputs, strict=True))
    assert not any(torch.equal(state, kept) for state, kept in zip(hidden.states, before, strict=True))


def test_one_block_is_in_memory_at_a_time(make_checkpoint, count_blocks):
    blocks = count_blocks(stream)
    log_likelihoods(CheckpointReader(make_checkpoint(num_hidden_layers=4)), WINDOWS[:1])
    assert len(blocks.built) == 4
    assert blocks.most == 1

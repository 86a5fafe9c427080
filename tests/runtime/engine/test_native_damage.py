"""Damaged checkpoints: the native engine refuses them with words or runs what they say, and never crashes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_4bit
from schemes import SCHEMES

from quant.llama import CheckpointError
from runtime.engine.native import NativeRunner
from runtime.engine.runner import SequenceSlice

ROUNDS = 150


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_4bit(tmp_path_factory.mktemp("sound") / "model", scheme=SCHEMES["mixed sites"])


def run(path: Path) -> bool:
    """Loads it and computes a step. False: it was refused."""
    try:
        runner = NativeRunner(path, threads=1, num_blocks=4)
    except CheckpointError as error:
        if str(path) not in str(error):
            raise
        return False
    ids = np.arange(8, dtype=np.int32)
    logits = runner.step([SequenceSlice(ids, 0, np.arange(4, dtype=np.int32), 8)])
    assert logits.rows().shape == (8, runner.info.vocab_size)
    assert all(-1 <= token < runner.info.vocab_size for token in logits.argmax())
    return True


@pytest.mark.parametrize("file", ["osp.safetensors", "config.json", "tokenizer.json"])
def test_random_bytes(sound: Path, tmp_path: Path, file: str) -> None:
    """Bytes are changed, cut off, taken out and put in, anywhere in the file."""
    model = shutil.copytree(sound, tmp_path / "model")
    content, chance = (sound / file).read_bytes(), random.Random(file)
    outcomes = set()
    for _ in range(ROUNDS):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 4, 64))):
            # Headers, at the start, are where most can go wrong.
            at = chance.randrange(min(len(damaged), chance.choice((16, 4096, len(damaged)))))
            match chance.randrange(4):
                case 0:
                    damaged[at] = chance.randrange(256)
                case 1:
                    damaged[at] ^= 1 << chance.randrange(8)
                case 2:
                    del damaged[at : at + chance.randrange(1, 20)]
                case _:
                    damaged[at:at] = chance.randbytes(chance.randrange(1, 20))
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        (model / file).write_bytes(damaged)
        outcomes.add(run(model))
    assert False in outcomes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 10),
        ("hidden_size", 2**30),
        ("vocab_size", 2**31 - 1),
        ("max_position_embeddings", 2**40),
        ("intermediate_size", 1),
        ("rope_theta", 0),
    ],
)
def test_a_config_of_another_shape(sound: Path, tmp_path: Path, key: str, value: Any) -> None:
    model = shutil.copytree(sound, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    if key == "rope_theta":
        config["rope_parameters"]["rope_theta"] = value
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    assert not run(model)


def test_a_context_for_which_there_is_no_memory(sound: Path, tmp_path: Path) -> None:
    model = shutil.copytree(sound, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2**31 - 1}))
    with pytest.raises(CheckpointError, match=r"a KV cache for 2147483648 positions takes .* GiB"):
        NativeRunner(model, threads=1)


def test_weights_and_norms_of_extreme_size(tmp_path: Path) -> None:
    """Logits may be infinite or NaN then; a row without a usable maximum says so, and the others go on."""
    from safetensors.numpy import load_file, save_file

    model = write_4bit(tmp_path / "model")
    tensors = load_file(model / "osp.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, model / "osp.safetensors")
    assert run(model)

"""Weights in files and shards: every tensor comes from the file that it belongs to, or is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from checkpoints import refusal
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from quant.format import INDEX_FILE, read_checkpoint, write_json


def test_shards_are_read_through_the_index(make_checkpoint):
    whole, shards = read_checkpoint(make_checkpoint()), read_checkpoint(make_checkpoint("shards", max_shard_size="8KB"))
    assert len(list(shards.path.glob("*.safetensors"))) > 1
    assert all(shards.linears[name].tobytes() == whole.linears[name].tobytes() for name in whole.linears)


def test_a_missing_shard_is_named(make_checkpoint):
    path = make_checkpoint(max_shard_size="8KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(path)
    write_json(path / INDEX_FILE, {"weight_map": {}})
    assert "names no shards" in refusal(path)


@pytest.fixture
def sharded(make_checkpoint):
    """`sharded(change)`: a sharded checkpoint; `change(weight_map)` has edited its index."""
    path = make_checkpoint(max_shard_size="8KB")

    def edit(change):
        index = json.loads((path / INDEX_FILE).read_text())
        change(index["weight_map"])
        write_json(path / INDEX_FILE, index)
        return path

    return edit


NOT_FILE_NAMES = ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "", "x.bin", 5, None, [], {}, True]


@pytest.mark.parametrize("entry", [*NOT_FILE_NAMES, "/" * 5000], ids=repr)
def test_an_index_names_nothing_but_files_beside_it(sharded, tmp_path, entry):
    path = sharded(lambda weight_map: weight_map.update({"model.norm.weight": entry}))
    save_file(
        {"model.norm.weight": np.ones(24, np.float32)}, tmp_path / "x.safetensors"
    )  # it is there, and is not read
    assert f"{INDEX_FILE}: " in refusal(path)
    assert "is not the name of a .safetensors file beside it" in refusal(path)


def test_a_shard_of_an_endless_name_is_missing(sharded):
    path = sharded(lambda weight_map: weight_map.update({"model.norm.weight": "x" * 5000 + ".safetensors"}))
    assert "names shards that are missing: xxx" in refusal(path)
    assert len(refusal(path)) < 1000


def test_a_tensor_in_two_shards_is_refused(sharded):
    path = sharded(lambda weight_map: None)
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.norm.weight" not in tensors:
            save_file(tensors | {"model.norm.weight": np.ones(24, np.float32)}, shard)
            break
    assert f"tensor model.norm.weight lies in {shard.name}, but {INDEX_FILE} states model-" in refusal(path)


def test_a_tensor_lies_where_the_index_states(sharded):
    def swap(weight_map):
        first, last = min(weight_map.values()), max(weight_map.values())
        weight_map["model.norm.weight"] = first if weight_map["model.norm.weight"] == last else last

    assert "tensor model.norm.weight lies in model-" in refusal(sharded(swap))
    swapped_back = sharded(lambda weight_map: weight_map.pop("model.norm.weight"))
    assert f"{INDEX_FILE} does not name it" in refusal(swapped_back)


def test_a_tensor_that_only_the_index_has_is_refused(sharded):
    path = sharded(lambda weight_map: weight_map.update({"model.more.weight": weight_map["model.norm.weight"]}))
    assert "tensor model.more.weight is missing from model-" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_a_type_that_numpy_does_not_know_is_refused(checkpoint_path, dtype):
    file = checkpoint_path / "model.safetensors"
    tensors = load_torch(file)
    save_torch(tensors | {"model.norm.weight": tensors["model.norm.weight"].float().to(dtype)}, file)
    assert "tensor model.norm.weight is " in refusal(checkpoint_path)


def test_one_file_goes_before_shards(sharded, make_checkpoint):
    path, other = sharded(lambda weight_map: None), make_checkpoint("other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = np.full(24, 3, np.float32)
    save_file(tensors, path / "model.safetensors")
    assert (read_checkpoint(path).norms["model.norm.weight"] == 3).all()

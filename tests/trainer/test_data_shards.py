import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data_shards import ShardWriter, TokenShards


def written(folder, documents, shard_tokens, dtype="uint16"):
    with ShardWriter(folder, "train", dtype, shard_tokens) as writer:
        for document in documents:
            writer.append(document)
    return writer


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_535), max_size=9), max_size=9),
    shard_tokens=st.integers(1, 12),
    part=st.slices(60),
)
def test_shards_read_like_the_one_array_that_they_are(tmp_path_factory, documents, shard_tokens, part):
    folder = tmp_path_factory.mktemp("shards")
    writer = written(folder, documents, shard_tokens)
    whole = np.array([token for document in documents for token in document], np.uint16)
    stream = TokenShards(folder, writer.shards, "uint16")
    assert len(stream) == writer.tokens == len(whole)
    part = slice(part.start, part.stop)
    got = stream[part]
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, whole[part])
    assert all(shard["tokens"] == shard_tokens for shard in writer.shards[:-1])


def test_ids_are_little_endian_and_of_32_bits_where_16_do_not_do(tmp_path):
    writer = written(tmp_path, [[1, 70_000]], 10, "uint32")
    assert (tmp_path / "train-00000.bin").read_bytes() == (1).to_bytes(4, "little") + (70_000).to_bytes(4, "little")
    assert TokenShards(tmp_path, writer.shards, "uint32")[:].tolist() == [1, 70_000]


def test_the_shards_of_a_range_are_named(tmp_path):
    stream = TokenShards(tmp_path, written(tmp_path, [range(25)], 10).shards, "uint16")
    names = [f"train-0000{i}.bin" for i in range(3)]
    assert stream.files_of(0, 10) == names[:1]
    assert stream.files_of(9, 11) == names[:2]
    assert stream.files_of(10, 20) == names[1:2]
    assert stream.files_of(0, 25) == names
    assert stream.files_of(5, 5) == []


def test_a_full_disk_leaves_whole_shards_only(tmp_path):
    (tmp_path / "train-00001.bin.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*train-00001\.bin"):
        written(tmp_path, [range(25)], 10)
    assert [file.name for file in tmp_path.iterdir()] == ["train-00000.bin"]


def test_an_error_in_the_middle_leaves_no_half_shard(tmp_path):
    with pytest.raises(OverflowError):
        written(tmp_path, [[1, 2, 3], [70_000]], 10)
    assert not list(tmp_path.iterdir())


def test_a_stream_is_read_in_order(tmp_path):
    stream = TokenShards(tmp_path, written(tmp_path, [range(25)], 10).shards, "uint16")
    with pytest.raises(ValueError, match="step"):
        stream[::2]

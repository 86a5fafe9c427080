"""Interrupted runs: what stays, what goes on, what is refused, and that nothing else is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from quant import convert, stream
from quant.clip import ClipSearch
from quant.convert import quantize_checkpoint
from quant.format import read_checkpoint
from quant.layers import LayerQuantizer
from quant.partial import OtherRunError, partial_run
from quant.scheme import named

W4A4 = named("w4a4")
FILES = ("osp.safetensors", "osp.json", "config.json", "tokenizer.json")
TABLES = "tables"


class StoppedError(BaseException):
    """Like Ctrl-C, no `Exception`."""


@contextmanager
def stopping_before(part):
    """The run stops when it begins to round that layer, or the tables."""
    layer, tables = LayerQuantizer.layer, LayerQuantizer.tables

    def stopping_layer(self, index, seen):
        if index == part:
            raise StoppedError
        return layer(self, index, seen)

    def stopping_tables(self, head_input):
        if part == TABLES:
            raise StoppedError
        return tables(self, head_input)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerQuantizer, "layer", stopping_layer)
        patch.setattr(LayerQuantizer, "tables", stopping_tables)
        with pytest.raises(StoppedError) as stopped:
            yield stopped


@pytest.fixture
def path(make_checkpoint):
    return make_checkpoint(num_hidden_layers=3, intermediate_size=40)


@pytest.fixture
def interrupted(path, text_path, tmp_path):
    """A run into tmp_path/out that stopped in its second layer; its partial directory."""
    with stopping_before(1):
        quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    return tmp_path / ".out.partial"


SCHEMES = {
    "w4a4": W4A4,
    "rotated": W4A4.changed(hadamard="full"),
    "static head": W4A4.changed(head={"activation_granularity": "tensor"}),
    "without text": named("w4a16"),
}


@pytest.mark.parametrize("part", [1, 2, TABLES])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(path, text_path, tmp_path, scheme, part):
    quantize_checkpoint(path, tmp_path / "whole", scheme, calibration=[text_path])
    with stopping_before(part) as stopped:
        quantize_checkpoint(path, tmp_path / "out", scheme, calibration=[text_path])
    done = 3 if part == TABLES else part
    note = f"the finished parts ({done}) are kept in {tmp_path / '.out.partial'}; go on with --resume"
    assert stopped.value.__notes__[0].startswith(note)
    assert not (tmp_path / "out").exists()

    with pytest.MonkeyPatch.context() as patch:
        rounded, layer = [], LayerQuantizer.layer
        patch.setattr(LayerQuantizer, "layer", lambda self, i, seen: rounded.append(i) or layer(self, i, seen))
        quantize_checkpoint(path, tmp_path / "out", scheme, calibration=[text_path], resume=True)
    assert rounded == list(range(done, 3))
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / ".out.partial").exists()


def test_a_run_that_is_stopped_twice_goes_on_twice(path, text_path, tmp_path, interrupted):
    with stopping_before(2):
        quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path], resume=True)
    quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path], resume=True)
    assert read_checkpoint(tmp_path / "out").scheme == W4A4


def test_what_was_finished_when_measuring_failed_is_not_done_again(path, text_path, tmp_path, monkeypatch):
    def fail(*_arguments, **_settings):
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "measure_perplexity", fail)
        with pytest.raises(RuntimeError, match="the disk is full") as failed:
            quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    assert "the finished parts (4)" in failed.value.__notes__[0]
    monkeypatch.setattr(convert, "HiddenStates", fail)  # nothing has to be calibrated any more
    quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path], resume=True)


def test_an_interrupted_run_is_not_overwritten_unasked(path, text_path, tmp_path, interrupted):
    with pytest.raises(
        FileExistsError, match=r"\.out\.partial holds an unfinished run; go on with --resume, or remove"
    ):
        quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    assert [file.name for file in sorted(interrupted.iterdir())] == [
        "checkpoint",
        "layer-00000.safetensors",
        "lock",
        "run.json",
    ]


def test_a_run_goes_on_only_with_what_it_was_started_with(path, text_path, tmp_path, interrupted):
    def resume(scheme=W4A4, **settings):
        with pytest.raises(OtherRunError) as refused:
            quantize_checkpoint(path, tmp_path / "out", scheme, **{"calibration": [text_path], **settings}, resume=True)
        assert not hasattr(refused.value, "__notes__")  # which would say to go on with --resume
        return str(refused.value).partition("differs in: ")[2].partition(";")[0]

    assert resume(named("w4a8")) == "scheme"
    assert resume(W4A4.changed(kv_bits=4)) == "scheme"
    assert resume(weights="gptq", clip=ClipSearch(norm=3)) == "--clip, --weights"
    assert resume(calibration=[]) == "calibration text"
    assert resume(heldout=[text_path]) == "calibration text"  # of which nothing is held back then
    os.utime(path / "model.safetensors")
    assert resume() == "source files"
    assert (interrupted / "layer-00000.safetensors").exists()


def test_what_a_crash_has_cut_short_is_made_again(path, text_path, tmp_path, interrupted):
    quantize_checkpoint(path, tmp_path / "whole", W4A4, calibration=[text_path])
    part = interrupted / "layer-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path], resume=True)
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_to_the_same_place_is_refused_while_the_first_is_at_work(path, text_path, tmp_path, resume):
    layer = LayerQuantizer.layer

    def interfering(self, index, seen):
        with pytest.raises(BlockingIOError, match=rf"at work in {tmp_path / '.out.partial'}; wait") as refused:
            quantize_checkpoint(path, tmp_path / "out", named("w4a16"), heldout=[text_path], resume=resume)
        assert not hasattr(refused.value, "__notes__")
        return layer(self, index, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerQuantizer, "layer", interfering)
        quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    assert read_checkpoint(tmp_path / "out").scheme == W4A4
    assert not (tmp_path / ".out.partial").exists()


def test_a_run_that_was_killed_holds_no_lock(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from quant.partial import partial_run\n"
        "with partial_run(pathlib.Path(sys.argv[1]), resume=False) as run:\n"
        "    run.begin({})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.partial" / "lock").exists()
    with partial_run(tmp_path / "out", resume=False) as run:
        run.begin({})
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_to_resume_what_never_began_is_to_begin(path, text_path, tmp_path):
    quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path], resume=True)
    assert read_checkpoint(tmp_path / "out").scheme == W4A4


# ---- nothing is left behind ----


def test_failing_before_a_layer_is_done_leaves_nothing(path, text_path, tmp_path):
    before = set(tmp_path.rglob("*"))
    for out in (tmp_path / "out", tmp_path / "new" / "parents" / "out"):
        with stopping_before(0):
            quantize_checkpoint(path, out, W4A4, calibration=[text_path])
        assert set(tmp_path.rglob("*")) == before


def test_a_directory_with_something_in_it_is_left_alone(path, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("keep")
    for taken in (out, out / "precious"):
        with pytest.raises(FileExistsError, match="not an empty directory"):
            quantize_checkpoint(path, taken, W4A4)
    assert [file.name for file in out.iterdir()] == ["precious"]


def test_an_empty_directory_is_filled_and_parents_are_made(path, text_path, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        quantize_checkpoint(path, out, W4A4, calibration=[text_path])
        assert read_checkpoint(out).precision == "w4a4"
        assert not list(out.parent.glob(".*.partial"))


def test_one_block_is_in_memory_at_a_time(make_checkpoint, text_path, tmp_path, count_blocks):
    blocks = count_blocks(convert, stream)
    path = make_checkpoint(num_hidden_layers=4)
    quantize_checkpoint(path, tmp_path / "out", W4A4, calibration=[text_path])
    assert len(blocks.built) == 3 * 4  # to calibrate, and to measure before and after
    assert blocks.most == 1

"""What may not change unnoticed: the batches of a small corpus, and the first losses of both recipes on them.

The golden file was recorded before corpora were streamed. Losses in float32 on one thread are the same bits on the
machine that recorded them. Processors differ in the order of their sums: between the instruction sets of one machine
(`ATEN_CPU_CAPABILITY`), Adam's losses differed by 4e-7 of themselves, Muon's, which orthogonalizes in
bfloat16, by 5e-5. The tolerances are some 20 times that; a learning rate 5 % higher moves the losses by more.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.config import preset
from trainer.data import held_out_windows, prepare, training_batch
from trainer.loop import Trainer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text("utf-8"))
TOLERANCES = {"adam": 1e-5, "osp": 1e-3}
STEPS = 50


def digest(batches):
    return hashlib.sha256(b"".join(batch.numpy().astype("<i8").tobytes() for batch in batches)).hexdigest()


@pytest.fixture(scope="module")
def streams(licence_corpus, tmp_path_factory):
    return prepare([licence_corpus], tmp_path_factory.mktemp("golden"), preset("tiny", steps=STEPS))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_batches_are_the_golden_ones(streams):
    config = preset("tiny", steps=STEPS)
    assert (len(streams.train), len(streams.held_out)) == (GOLDEN["tokens"], GOLDEN["held_out_tokens"])
    assert digest(training_batch(streams.train, config, step) for step in range(STEPS)) == GOLDEN["batches_sha256"]
    held_out = held_out_windows(streams.held_out, config.model.context_length, config.eval_tokens)
    assert digest([held_out]) == GOLDEN["held_out_windows_sha256"]


@pytest.mark.parametrize("recipe", ["adam", "osp"])
def test_losses_are_the_golden_ones(streams, tmp_path, one_thread, recipe):
    trainer = Trainer.start(preset("tiny", steps=STEPS, recipe=recipe, device="cpu"), tmp_path, streams)
    losses = [trainer.train_step() for _ in range(STEPS)]
    np.testing.assert_allclose(losses, GOLDEN["losses"][recipe], rtol=TOLERANCES[recipe])


def test_a_slightly_other_recipe_is_noticed(streams, tmp_path, one_thread):
    config = preset("tiny", steps=STEPS, device="cpu")
    trainer = Trainer.start(replace(config, matrix_lr=config.matrix_lr * 1.05), tmp_path, streams)
    losses = np.array([trainer.train_step() for _ in range(20)])
    assert np.abs(losses / GOLDEN["losses"]["osp"][:20] - 1).max() > TOLERANCES["osp"]

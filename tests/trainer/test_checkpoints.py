import errno
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer import checkpoints as store
from trainer.checkpoints import TrainingError, checkpoints, random_state, set_random_state, write_checkpoint
from trainer.config import ConfigError, preset
from trainer.data import prepare
from trainer.loop import Trainer

TINY = preset("tiny", steps=24, keep_checkpoints=2)


@pytest.fixture
def trainer(licence_corpus, tmp_path):
    return Trainer.start(TINY, tmp_path, prepare([licence_corpus], tmp_path / "data", TINY))


def steps_of(directory):
    return [int(file.stem.removeprefix("step-")) for file in checkpoints(directory)]


def test_the_newest_and_the_best_stay(trainer, tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 3.2, 6: 2.5, 7: 2.6, 8: 2.7}
    kept = {}
    for step, loss in losses.items():
        trainer.step = step
        trainer.save(loss)
        kept[step] = steps_of(tmp_path)
    assert kept[5] == [2, 4, 5]
    assert kept[6] == [5, 6]
    assert kept[8] == [6, 7, 8]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text("utf-8"))
    assert best == {"checkpoint": "step-00000006.pt", "step": 6, "held_out_loss": 2.5}


def test_the_best_is_remembered_when_a_run_goes_on(trainer, tmp_path):
    trainer.step = 1
    trainer.save(2.0)
    trainer.step = 2
    trainer.save(3.0)
    again = Trainer.start(TINY, tmp_path, trainer.streams)
    again.restore(checkpoints(tmp_path)[-1])
    for step, loss in ((3, 2.9), (4, 2.8), (5, 2.7)):
        again.step = step
        again.save(loss)
    assert steps_of(tmp_path) == [1, 4, 5]


def test_a_full_disk_leaves_the_last_checkpoint_whole(trainer, tmp_path):
    trainer.train_step()
    trainer.save(5.0)
    (good,) = checkpoints(tmp_path)
    before = good.read_bytes()
    trainer.train_step()
    # The kernel's own full disk: what is written to this file ends with ENOSPC.
    (tmp_path / "checkpoints" / "step-00000002.pt.partial").symlink_to("/dev/full")
    with pytest.raises(
        TrainingError, match=r"step 2 could not be written \(No space left on device\); .*00001\.pt is whole"
    ):
        trainer.save(4.0)
    assert checkpoints(tmp_path) == [good]
    assert good.read_bytes() == before
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    again = Trainer.start(TINY, tmp_path, trainer.streams)
    again.restore(good)
    assert again.step == 1


@pytest.mark.parametrize("written", [0, 100_000])
def test_a_disk_that_fills_up_while_writing_is_named(trainer, tmp_path, monkeypatch, written):
    trainer.save(5.0)
    (good,) = checkpoints(tmp_path)

    def save(state, file):
        file.write(bytes(written))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.torch, "save", save)
    trainer.step = 1
    with pytest.raises(TrainingError, match="No space left on device"):
        trainer.save(4.0)
    assert [file.name for file in (tmp_path / "checkpoints").glob("*.p*")] == [good.name]


def test_the_first_checkpoint_that_fails_says_that_there_is_none(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000007.pt.partial").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="there is no other"):
        write_checkpoint(tmp_path, {"step": 7, "noise": torch.randn(100_000)})


def test_what_a_killed_write_left_is_no_checkpoint(trainer, tmp_path):
    trainer.save(5.0)
    (tmp_path / "checkpoints" / "step-00000009.pt.partial").write_bytes(b"half")
    assert steps_of(tmp_path) == [0]
    trainer.step = 9
    trainer.save(4.0)
    assert steps_of(tmp_path) == [0, 9]


def test_every_random_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return random.random(), np.random.random(3).tolist(), np.random.standard_normal(), torch.rand(3).tolist()

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = [draw() for _ in range(3)]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_checkpoint_of_another_preset_is_refused_by_name(trainer, tmp_path):
    trainer.save(5.0)
    (file,) = checkpoints(tmp_path)
    model = replace(TINY.model, hidden_size=32, num_heads=1)
    other = Trainer.start(replace(TINY, model=model, seed=3), tmp_path, trainer.streams)
    refused = r"hidden_size: 64 then, 32 now; num_heads: 2 then, 1 now; seed: 0 then, 3 now"
    with pytest.raises(ConfigError, match=refused):
        other.restore(file)


def test_a_damaged_checkpoint_is_named(trainer, tmp_path):
    trainer.save()
    (file,) = checkpoints(tmp_path)
    for content in (file.read_bytes()[: file.stat().st_size // 2], b"", b"no checkpoint"):
        file.write_bytes(content)
        with pytest.raises(TrainingError, match=r"step-00000000\.pt is damaged"):
            trainer.restore(file)

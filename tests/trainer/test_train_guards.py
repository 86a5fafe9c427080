import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from trainer.checkpoints import TrainingError, checkpoints
from trainer.config import preset
from trainer.data import prepare, window_starts
from trainer.guard import TrainingStoppedError, stop_requests
from trainer.loop import Trainer

TINY = preset("tiny", steps=8, skip_limit=3)


@pytest.fixture
def trainer(licence_corpus, tmp_path):
    return Trainer.start(TINY, tmp_path, prepare([licence_corpus], tmp_path / "data", TINY))


def state_of(trainer):
    moments = [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
    return [tensor.clone() for tensor in [*trainer.model.parameters(), *moments]]


def poison(trainer, at):
    """A gradient of `down_proj` that is not finite at the steps `at`, 0-based."""
    weight = trainer.model.layers[1].mlp.down_proj.weight
    weight.register_hook(lambda gradient: gradient * float("inf") if trainer.step in at else gradient)


def test_a_step_that_is_not_finite_is_skipped_whole_and_counted(trainer):
    poison(trainer, {2})
    for _ in range(2):
        trainer.train_step()
    before = state_of(trainer)
    trainer.train_step()
    assert all(torch.equal(old, new) for old, new in zip(before, state_of(trainer), strict=True))
    assert (trainer.step, trainer.guard.skipped, trainer.guard.in_a_row) == (3, 1, 1)
    trainer.train_step()
    assert (trainer.step, trainer.guard.skipped, trainer.guard.in_a_row) == (4, 1, 0)
    assert any(not torch.equal(old, new) for old, new in zip(before, state_of(trainer), strict=True))


def test_a_run_in_which_no_step_is_finite_ends_with_its_checkpoint_whole(trainer, tmp_path):
    poison(trainer, {1, 3, 4, 5})
    for _ in range(3):
        trainer.train_step()
    trainer.save(5.0)
    (good,) = checkpoints(tmp_path)
    content = good.read_bytes()
    with pytest.raises(TrainingError) as raised:
        trainer.run(quiet=True)
    message = str(raised.value)
    assert "step 6: loss" in message
    assert "gradient norm" in message
    assert "3 steps in a row" in message
    assert "The gradient of layers.1.mlp.down_proj.weight is not finite" in message
    assert "train-00000.bin" in message
    assert "step-00000003.pt is untouched" in message
    assert checkpoints(tmp_path) == [good]
    assert good.read_bytes() == content
    assert trainer.guard.skipped == 4


def test_a_parameter_that_is_not_finite_itself_is_named(trainer):
    with torch.no_grad():
        trainer.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    before = state_of(trainer)
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(
        TrainingError, match=r"Parameter layers\.0\.mlp\.up_proj\.weight itself .* There is no checkpoint"
    ):
        trainer.train_step()
    for old, new in zip(before, state_of(trainer), strict=True):
        assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))


def test_a_model_that_is_not_finite_takes_no_checkpoints_place(trainer, tmp_path):
    trainer.save(5.0)
    before = {file.name: file.read_bytes() for file in (tmp_path / "checkpoints").iterdir()}
    with torch.no_grad():
        trainer.model.norm.scale.fill_(float("nan"))
    trainer.step = 8
    with pytest.raises(
        TrainingError, match=r"step 8: the held-out loss is NaN.*Parameter norm\.scale.*00000000\.pt is untouch"
    ):
        trainer.save(trainer.evaluate().held_out_loss)
    assert {file.name: file.read_bytes() for file in (tmp_path / "checkpoints").iterdir()} == before


def test_the_shard_that_is_named_is_the_one_that_was_read(licence_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.SHARD_TOKENS", 500)
    config = replace(TINY, batch_tokens=64, skip_limit=1)
    trainer = Trainer.start(config, tmp_path, prepare([licence_corpus], tmp_path / "data", config))
    poison(trainer, {4})
    for _ in range(4):
        trainer.train_step()
    (start,) = window_starts(len(trainer.streams.train), config, 4)
    assert start // 500 == (start + config.model.context_length) // 500
    with pytest.raises(TrainingError, match=rf"The step read train-{start // 500:05d}\.bin"):
        trainer.train_step()


def test_skipped_steps_are_in_the_log_and_the_checkpoint(trainer, tmp_path):
    def spoil(_module, _inputs, logits_BLV):
        return logits_BLV * torch.nan if trainer.step == 7 and torch.is_grad_enabled() else logits_BLV

    trainer.model.lm_head.register_forward_hook(spoil)
    trainer.run(quiet=True)
    line = json.loads((tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert (line["skipped_steps"], line["loss"]) == (1, None)
    assert torch.load(checkpoints(tmp_path)[-1], weights_only=True)["skipped"] == [1, 1]


def test_sigterm_is_heard_between_steps_and_then_does_what_it_did(trainer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(_gradient):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.lm_head.weight.register_hook(interrupt)
    with pytest.raises(TrainingStoppedError) as stopped:
        trainer.run(quiet=True)
    assert stopped.value.step == 3
    assert [file.name for file in checkpoints(tmp_path)] == ["step-00000003.pt"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_elsewhere_than_in_the_main_thread_nobody_asks():
    answers = []

    def ask():
        with stop_requests() as requested:
            answers.append(requested())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]

"""What a run tells of itself, as the readers of its files see it."""

import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.checkpoints import checkpoints
from trainer.config import preset
from trainer.data import held_out_windows, prepare
from trainer.evaluation import Evaluation
from trainer.guard import TrainingStoppedError
from trainer.loop import Trainer
from trainer.outliers import SITES, SiteOutliers, measure_outliers
from trainer.telemetry import telemetry

TINY = preset("tiny", steps=12, eval_every=4, checkpoint_every=8)


@pytest.fixture(scope="module")
def streams(licence_corpus, tmp_path_factory):
    return prepare([licence_corpus], tmp_path_factory.mktemp("data"), TINY)


def start(directory, streams):
    directory.mkdir(exist_ok=True)
    trainer = Trainer.start(TINY, directory, streams)
    if found := checkpoints(directory):
        trainer.restore(found[-1])
    return trainer


@pytest.fixture(scope="module")
def whole(streams, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    start(directory, streams).run(quiet=True, tensorboard=True)
    return directory


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def scalars(directory):
    """{tag: {step: value}}, as TensorBoard shows them."""
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    return {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def test_every_evaluation_has_a_line_with_every_site_and_layer(whole, streams):
    told = lines(whole / "outliers.jsonl")
    assert [line["step"] for line in told] == [0, 4, 8, 12]
    for line in told:
        for view in ("in_context", "single_tokens"):
            assert list(line[view]) == list(SITES)
            assert {len(of) for site in line[view].values() for of in site.values()} == {TINY.model.num_layers}
    trainer = start(whole, streams)
    windows_BL = held_out_windows(streams.held_out, TINY.model.context_length, TINY.eval_tokens)[:8, :-1]
    assert told[-1]["in_context"]["down"]["absmax"] == measure_outliers(trainer.model, windows_BL)["down"].absmax
    alone = measure_outliers(trainer.model, windows_BL.reshape(-1, 1)[:1024])["o"]
    assert told[-1]["single_tokens"]["o"]["excess_kurtosis"] == alone.excess_kurtosis
    short = lines(whole / "metrics.jsonl")[-1]
    assert short["absmax"] == max(told[-1]["in_context"]["residual"]["absmax"])


def test_tensorboard_shows_what_the_lines_say(whole):
    shown = scalars(whole)
    for line in lines(whole / "outliers.jsonl"):
        for view in ("in_context", "single_tokens"):
            for site, of in line[view].items():
                for layer, value in enumerate(of["excess_kurtosis"]):
                    tag = f"excess_kurtosis_{view}_{site}/layer_{layer:02d}"
                    assert shown[tag][line["step"]] == pytest.approx(value, rel=1e-6)
                mean = sum(of["excess_kurtosis"]) / len(of["excess_kurtosis"])
                assert shown[f"excess_kurtosis_{view}/{site}"][line["step"]] == pytest.approx(mean, rel=1e-6)
                assert shown[f"absmax_{view}/{site}"][line["step"]] == pytest.approx(max(of["absmax"]), rel=1e-6)
    for line in lines(whole / "metrics.jsonl"):
        assert shown["training/loss"][line["step"]] == pytest.approx(line["loss"], rel=1e-6)


def test_a_run_that_was_killed_tells_the_same_once_it_is_resumed(whole, streams, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed_after_11(self, step=Trainer.train_step):
        if self.step == 11:
            raise KilledError
        loss = step(self)
        return loss + 1 if self.step > 8 else loss  # what is not saved is seen to be dropped

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", killed_after_11)
        with pytest.raises(KilledError):
            start(tmp_path, streams).run(quiet=True, tensorboard=True)
    # A line beyond the checkpoint of step 8, and one cut off.
    with (tmp_path / "outliers.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 10, "in_context": {}}\n{"step": 12, "in_con')
    start(tmp_path, streams).run(quiet=True, tensorboard=True)
    assert (tmp_path / "outliers.jsonl").read_bytes() == (whole / "outliers.jsonl").read_bytes()
    unbroken, resumed = (
        [{**line, "tokens_per_s": None} for line in lines(directory / "metrics.jsonl")]
        for directory in (whole, tmp_path)
    )
    assert resumed == unbroken
    shown, expected = scalars(tmp_path), scalars(whole)
    assert shown.keys() == expected.keys()
    for tag in expected.keys() - {"training/tokens_per_s"}:
        assert shown[tag] == expected[tag], tag


def test_a_run_that_is_stopped_at_once_has_told_of_its_checkpoint(streams, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.distributed.any_of", lambda flag: True)
    with pytest.raises(TrainingStoppedError):
        start(tmp_path, streams).run(quiet=True)
    assert [line["step"] for line in lines(tmp_path / "outliers.jsonl")] == [0, 1]
    assert not (tmp_path / "tensorboard").exists()


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    sites = {site: SiteOutliers([0.0, 1.0], [math.nan, 2.0]) for site in SITES}
    evaluation = Evaluation(math.inf, {"in_context": sites, "single_tokens": sites})
    with telemetry(tmp_path, 0) as log:
        log.evaluated(3, evaluation)
        log.trained(3, {"loss": -math.inf, "speed": 2.0})
    assert math.isnan(evaluation.summary()["absmax"])
    text = (tmp_path / "outliers.jsonl").read_text("utf-8") + (tmp_path / "metrics.jsonl").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines(tmp_path / "outliers.jsonl")[0]["in_context"]["down"]["absmax"] == [None, 2.0]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": None, "speed": 2.0}]


def test_of_several_processes_only_the_first_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.distributed.rank", lambda: 1)
    with telemetry(tmp_path, 0, tensorboard=True) as log:
        log.trained(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_leaves_random_numbers_alone(streams, tmp_path):
    trainer = start(tmp_path, streams)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), before)

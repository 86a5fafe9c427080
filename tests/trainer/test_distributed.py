"""Two processes on CPUs, which `torchrun` starts, against one: losses, checkpoints in both directions, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.trainer.rank_worker import CONFIG, STEPS, state_bytes
from trainer import distributed
from trainer.checkpoints import checkpoints
from trainer.config import ConfigError
from trainer.data import prepare, training_batch
from trainer.loop import Trainer
from trainer.optimizer import make_optimizers
from trainer.plan import optimizer_bytes

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
OSP = """
import sys
from runtime.cli import main
from tests.trainer.rank_worker import gloo_threads
main(sys.argv[1:], standalone_mode=False)
sys.exit(gloo_threads())
"""
"""The command `osp`, which fails if a thread of gloo's is left at its end."""


@pytest.fixture(scope="module")
def shared(licence_corpus, tmp_path_factory):
    """A run of one process, and where two processes began afresh, and went on from its checkpoint."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shared")
    for name in ("alone", "fresh", "resumed"):
        (folder / name).mkdir()
    streams = prepare([licence_corpus], folder / "data", CONFIG)
    alone = Trainer.start(CONFIG, folder / "alone", streams)
    losses = [alone.train_step() for _ in range(STEPS)]
    alone.save(1.0)
    for file in (folder / "alone").rglob("*.pt"):
        (folder / "resumed" / "checkpoints").mkdir()
        (folder / "resumed" / "checkpoints" / file.name).write_bytes(file.read_bytes())
    losses += [alone.train_step() for _ in range(STEPS)]
    command = [*TORCHRUN, str(ROOT / "tests/trainer/rank_worker.py"), folder, folder / "data", licence_corpus]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(2)]
    return folder, streams, losses, ranks


def test_two_processes_give_the_losses_of_one(shared):
    _, _, losses, ranks = shared
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses[:STEPS], rel=1e-5)
    assert losses[STEPS - 1] < losses[0] - 0.3


def test_two_processes_go_on_from_the_checkpoint_of_one(shared):
    _, _, losses, ranks = shared
    assert ranks[0]["resumed_losses"] == pytest.approx(losses[STEPS:], rel=1e-5)
    assert ranks[1]["resumed_losses"] == ranks[0]["resumed_losses"]


def test_one_process_goes_on_from_the_checkpoint_of_two(shared):
    folder, streams, losses, _ = shared
    trainer = Trainer.start(CONFIG, folder / "fresh", streams)
    trainer.restore(checkpoints(folder / "fresh")[-1])
    assert [trainer.train_step() for _ in range(STEPS)] == pytest.approx(losses[STEPS:], rel=1e-5)


def test_the_state_is_shared_as_the_plan_says(shared):
    folder, streams, _, ranks = shared
    trainer = Trainer.start(CONFIG, folder / "fresh", streams)
    trainer.restore(checkpoints(folder / "fresh")[-1])
    sizes = [rank["state_bytes"] for rank in ranks]
    assert sum(sizes) == state_bytes(trainer)
    assert max(sizes) == optimizer_bytes(trainer.model, CONFIG, devices=2)
    assert max(sizes) < 0.52 * sum(sizes)


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(shared):
    for rank in shared[3]:
        assert rank["skipped"] == [1, True]


def test_no_thread_of_gloos_is_left_that_could_end_the_process_by_sigabrt(shared):
    for rank in shared[3]:
        before, after = rank["gloo_threads"]
        assert before > 0
        assert after == 0


def test_sigterm_to_one_process_stops_all_with_one_checkpoint_and_one_answer(licence_corpus, tmp_path):
    options = ["--preset", "tiny", "--steps", "100000", "--checkpoint-every", "5", "--json"]
    options += ["--data", str(licence_corpus), "--out", str(tmp_path / "run")]
    run = subprocess.Popen(
        [*TORCHRUN, "--no-python", sys.executable, "-c", OSP, "train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    try:
        deadline = time.monotonic() + 200
        while not checkpoints(tmp_path / "run"):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (second,) = (child for child in psutil.Process(run.pid).children() if child.environ().get("RANK") == "1")
        second.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=100)
    finally:
        run.terminate()  # and torchrun ends those that it started
        run.wait(60)
    assert run.returncode == 0, err
    file = checkpoints(tmp_path / "run")[-1]
    assert json.loads(out) == {"stopped_at_step": int(file.stem[5:])}
    state = torch.load(file, weights_only=True)
    counts = [len(optimizer["state"]) for optimizer in state["optimizers"]]
    assert sum(counts) == len(state["model"])


def test_rows_that_cannot_be_shared_are_refused(shared):
    _, streams, _, _ = shared
    with pytest.raises(ConfigError, match="16 rows cannot be shared by 3 processes"):
        training_batch(streams.train, CONFIG, 0, 0, 3)


def test_one_process_is_alone(shared):
    _, streams, _, _ = shared
    trainer = Trainer.start(replace(CONFIG, recipe="adam"), Path("nowhere"), streams)
    assert trainer.replica is trainer.model
    assert [type(optimizer) for optimizer in make_optimizers(trainer.model, trainer.config)] == [torch.optim.AdamW]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_of(True)
    assert not distributed.any_of(False)

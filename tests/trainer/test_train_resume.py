"""Runs that are killed, stopped and resumed, in processes of their own, end bit for bit where an unbroken one does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from trainer.checkpoints import checkpoints
from trainer.config import preset
from trainer.train import train

STEPS, EVERY = 60, 5
TINY = preset("tiny", steps=STEPS, checkpoint_every=EVERY)


@pytest.fixture
def start(licence_corpus):
    """Starts `osp train` on one thread; whatever still runs at the end of the test is killed."""
    running = []

    def start(directory, *options):
        command = [sys.executable, "-m", "runtime.cli", "train", "--preset", "tiny", "--steps", str(STEPS), "--json"]
        command += ["--data", str(licence_corpus), "--out", str(directory), "--checkpoint-every", str(EVERY), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for_checkpoint(process, directory, beyond):
    while not (found := [file for file in checkpoints(directory) if int(file.stem[5:]) > beyond]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return int(found[-1].stem[5:])


def test_killed_stopped_and_resumed_equals_unbroken(start, licence_corpus, tmp_path):
    torch.set_num_threads(1)
    train([licence_corpus], tmp_path / "whole", TINY, quiet=True)

    broken = tmp_path / "broken"
    killed = start(broken)
    wait_for_checkpoint(killed, broken, 0)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    step = int(checkpoints(broken)[-1].stem[5:])
    assert step < STEPS

    stopped = start(broken, "--resume")
    wait_for_checkpoint(stopped, broken, step)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate()
    assert stopped.returncode == 0, err
    at = json.loads(out)["stopped_at_step"]
    assert step < at < STEPS
    assert int(checkpoints(broken)[-1].stem[5:]) == at

    train([licence_corpus], broken, TINY, resume=True, quiet=True)
    one, other = (torch.load(checkpoints(tmp_path / name)[-1], weights_only=True) for name in ("whole", "broken"))
    assert one["step"] == other["step"] == STEPS
    assert_equal(one, other)
    lines = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines == list(range(10, STEPS + 1, 10))


def assert_equal(one, other, path="checkpoint"):
    """Every tensor and number in two nested states is the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{path}[{index}]")
    else:
        assert one == other, path

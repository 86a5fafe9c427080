"""Where a run computes. No GPU is needed: that tensors follow the model is tried on torch's device without storage."""

import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from trainer.checkpoints import TrainingError, checkpoints
from trainer.compute import Compute
from trainer.config import ConfigError, preset
from trainer.data import prepare
from trainer.evaluation import evaluate
from trainer.loop import Trainer
from trainer.model import OSPModel

TINY = preset("tiny", steps=6, device="cpu")


@pytest.fixture(scope="module")
def streams(licence_corpus, tmp_path_factory):
    return prepare([licence_corpus], tmp_path_factory.mktemp("data"), TINY)


def losses(config, directory, streams):
    trainer = Trainer.start(config, directory, streams)
    return [trainer.train_step() for _ in range(config.steps)]


@pytest.mark.parametrize(
    ("wanted", "gpu", "bfloat16", "device", "dtype"),
    [
        ("auto", False, False, "cpu", torch.bfloat16),
        ("auto", True, True, "cuda:3", torch.bfloat16),
        ("auto", True, False, "cuda:3", torch.float32),
        ("cuda", True, True, "cuda:3", torch.bfloat16),
        ("cpu", True, True, "cpu", torch.bfloat16),
    ],
)
def test_the_device_is_what_is_wanted_and_there(monkeypatch, wanted, gpu, bfloat16, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)
    config = replace(TINY, device=wanted, autocast=True)
    assert Compute.chosen(config) == Compute(torch.device(device), dtype)
    assert Compute.chosen(replace(config, autocast=False)).dtype == torch.float32


def test_a_device_that_is_unknown_or_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no GPU here"):
        Compute.chosen(replace(TINY, device="cuda"))
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda, is 'tpu'"):
        replace(TINY, device="tpu")


def test_text_goes_to_the_models_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know this device
    model = OSPModel(TINY.model, "osp").to("meta")
    seen = []
    model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].device.type))
    loss = Compute(torch.device("meta")).loss(model, torch.zeros(2, 9, dtype=torch.long))
    assert (seen, loss.device.type, loss.dtype) == (["meta"], "meta", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_cross_entropy_of_the_next_token(dtype):
    torch.manual_seed(0)
    model = OSPModel(TINY.model, "osp")
    windows_BL = torch.randint(512, (3, 33))
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        loss = Compute(torch.device("cpu"), dtype).loss(model, windows_BL)
        logits_BLV = model(windows_BL[:, :-1]).double()
    picked = F.log_softmax(logits_BLV, -1).gather(-1, windows_BL[:, 1:, None])
    assert loss.item() == pytest.approx(-picked.mean().item(), rel=1e-6 if dtype == torch.float32 else 1e-3)
    assert seen[0] == dtype


def test_the_loss_of_an_evaluation_is_that_of_all_windows(streams):
    torch.manual_seed(0)
    model = OSPModel(TINY.model, "osp")
    evaluation = evaluate(model, Compute(torch.device("cpu")), streams.train, TINY)
    stream, length = torch.tensor(streams.train[0:].astype("int64")), TINY.model.context_length
    windows = [stream[at : at + length + 1] for at in range(0, len(stream) - length, length)]
    with torch.no_grad():
        each = [F.cross_entropy(model(window[None, :-1])[0], window[1:]).item() for window in windows]
    assert len(each) > 8  # more than go through the model at a time
    assert evaluation.held_out_loss == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert model.training


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_loss(streams, tmp_path, autocast, monkeypatch):
    config = replace(TINY, autocast=autocast, micro_batch_tokens=512)
    runs = []
    block = type(OSPModel(TINY.model, "osp").layers[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *inputs: (runs.append(1), forward(self, *inputs))[1])
    plain = losses(config, tmp_path, streams)
    once = len(runs)
    again = losses(replace(config, activation_checkpointing=True), tmp_path, streams)
    assert again == pytest.approx(plain, rel=1e-6)
    assert len(runs) - once == 2 * once


def test_a_compiled_model_has_the_same_losses_and_checkpoints(streams, tmp_path, monkeypatch):
    # Everything but the compiler of machine code, which takes most of a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = Trainer.start(replace(TINY, compile=True), tmp_path, streams)
    assert [compiled.train_step() for _ in range(TINY.steps)] == pytest.approx(
        losses(TINY, tmp_path, streams), rel=1e-5
    )
    compiled.save()
    plain = Trainer.start(TINY, tmp_path, streams)
    plain.restore(checkpoints(tmp_path)[-1])
    for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def restored_algorithms(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("restored_algorithms")
def test_deterministic_algorithms_are_all_that_a_run_needs(streams, tmp_path):
    plain = losses(TINY, tmp_path, streams)
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(replace(TINY, deterministic=True), tmp_path, streams) == plain
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_where_nothing_can_compile_the_error_says_how_to_train(streams, tmp_path):
    import torch._inductor.config as inductor

    trainer = Trainer.start(replace(TINY, compile=True), tmp_path, streams)
    with (
        inductor.patch({"cpp.cxx": (None, "/no/compiler"), "force_disable_caches": True}),
        pytest.raises(TrainingError, match=r"cannot be compiled here \(.*\); train without --compile"),
    ):
        trainer.train_step()

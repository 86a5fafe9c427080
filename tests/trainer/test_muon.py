"""Muon against torch.optim.Muon; the latter in other types too, by making its `bfloat16()` a copy in the same type."""

import pytest
import torch

from trainer.muon import MOST_TOGETHER, Muon, _alike, orthogonalized

SHAPES = [(24, 24), (24, 64), (64, 24), (24, 24), (7, 13), (13, 7), (1, 9), (24, 64)]
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "eps": 1e-8, "ns_steps": 5}


def twins(dtype):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    return [[torch.nn.Parameter(x.clone()) for x in start] for _ in range(2)]


def run(ours, theirs, muon, oracle, steps=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=one.dtype)
            other.grad = one.grad.clone()
        before = [one.grad.clone() for one in ours]
        muon.step()
        oracle.step()
        assert all(torch.equal(one.grad, gradient) for one, gradient in zip(ours, before, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_several_steps_equal_torchs_in_full_precision(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = twins(dtype)
    muon = Muon(ours, dtype=dtype, **SETTINGS)
    oracle = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    run(ours, theirs, muon, oracle)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            muon.state[one]["momentum_buffer"], oracle.state[other]["momentum_buffer"], rtol=1e-6, atol=1e-6
        )


def test_several_steps_are_about_torchs_in_bfloat16():
    ours, theirs = twins(torch.float32)
    start = [x.detach().clone() for x in ours]
    run(ours, theirs, Muon(ours, **SETTINGS), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **SETTINGS))
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (other - before).norm()


def test_state_moves_between_ours_and_torchs():
    ours, theirs = twins(torch.float32)
    muon, oracle = Muon(ours, **SETTINGS), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    run(ours, theirs, muon, oracle, steps=2)
    again = Muon(ours, **SETTINGS)
    again.load_state_dict(oracle.state_dict())
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(again.state[one]["momentum_buffer"], oracle.state[other]["momentum_buffer"])
    again.step()


def test_singular_values_come_near_one():
    x_BNK = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalized(x_BNK))
    assert values.min() > 0.65
    assert values.max() < 1.2


def test_a_matrix_does_not_depend_on_its_batch():
    x_BNK = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x_BNK[1] *= 1e6
    alone = [orthogonalized(x_NK[None])[0] for x_NK in x_BNK]
    torch.testing.assert_close(orthogonalized(x_BNK), torch.stack(alone), rtol=1e-10, atol=1e-12)


def test_a_zero_gradient_moves_nothing():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.zeros(4, 6)
    Muon([parameter], weight_decay=0.0).step()
    assert torch.equal(parameter, torch.ones(4, 6))


def test_a_parameter_without_a_gradient_is_left_alone():
    one, other = torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(4, 6))
    one.grad = torch.randn(4, 6)
    muon = Muon([one, other])
    muon.step()
    assert torch.equal(other, torch.ones(4, 6))
    assert list(muon.state) == [one]


def test_what_goes_together_is_bounded():
    with torch.device("meta"):
        large = [torch.empty(4096, 3072), torch.empty(3072, 4096), torch.empty(4096, 3072), torch.empty(8192, 8192)]
    assert [len(part) for part in _alike(large)] == [2, 1, 1]
    assert 2 * 4096 * 3072 <= MOST_TOGETHER < 3 * 4096 * 3072


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="Muon is for matrices"):
        Muon([torch.nn.Parameter(torch.zeros(shape))])

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks.step_time import Step, main
from trainer.config import preset


def test_a_step_leaves_the_gradient_of_the_whole_batch():
    step = Step.of(preset("tiny", micro_batch_tokens=256))
    whole = Step.of(preset("tiny", micro_batch_tokens=1024))
    for one in (step, whole):
        torch.manual_seed(1)
        assert one.take() == one.gradients_s + one.update_s > 0
    for part, of in zip(step.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(part.grad, of.grad, atol=1e-6, rtol=1e-4)


def test_the_report_is_one_object_of_what_was_measured():
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(main, ["--preset", "tiny", "--rounds", "1", "--json"])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["osp_over_adam"] == pytest.approx(report["osp_s"] / report["adam_s"])
    assert report["muon_over_torchs"] == pytest.approx(report["muon_s"] / report["torch_muon_s"])
    assert (report["preset"], report["batch_tokens"], report["threads"]) == ("tiny", 1024, 1)

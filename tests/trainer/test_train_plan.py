import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.cli import train as train_command
from trainer.config import PRESETS, RECIPES, preset
from trainer.model import OSPModel
from trainer.optimizer import make_optimizers
from trainer.plan import activation_bytes, make_plan, optimizer_bytes, step_flops


def test_the_papers_model_has_the_papers_size():
    plan = make_plan(PRESETS["1.4b"], tflops=1)
    parameters = plan["parameters"]
    projections, gains = 2 * 2048**2, 49 * 2048
    assert parameters["total"] == parameters["matrices"] + parameters["tables"] + parameters["norms"]
    assert round((parameters["total"] - projections) / 1e9, 4) == 1.4156
    assert parameters["exported"] - gains == parameters["total"] - projections - 49


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_and_optimizer_state_are_those_of_a_real_run(recipe):
    config = preset("tiny", recipe=recipe)
    model = OSPModel(config.model, config.recipe)
    plan = make_plan(config, tflops=1)
    assert plan["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    optimizers = make_optimizers(model, config)
    model(torch.randint(512, (1, 8))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in states if tensor.ndim or tensor.numel() > 1)
    scalars = 2 * 4 * sum(p.numel() == 1 for p in model.parameters())
    assert optimizer_bytes(model, config) == pytest.approx(kept + scalars, rel=1e-3)


@pytest.mark.parametrize("again", [False, True])
def test_flops_are_those_that_torch_counts(again):
    config = preset("tiny", recipe="adam", activation_checkpointing=again)
    model = OSPModel(config.model, config.recipe, activation_checkpointing=again)
    rows, length = 16, config.model.context_length
    assert rows * length == config.batch_tokens
    # Attention as plain matrix products, which the counter knows on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(512, (rows, length))).sum().backward()
    assert step_flops(model, config) == counter.get_total_flops()


@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_about_what_autograd_keeps(autocast):
    config = preset("17m", autocast=autocast, micro_batch_tokens=1024)
    model = OSPModel(config.model, config.recipe)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its memory is not used again
        return tensor

    ids_BL = torch.randint(8192, (1, 1024))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits_BLV = model(ids_BL)
        loss = torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), ids_BL.flatten())
    measured = sum(size for size, _ in kept.values())
    assert loss.isfinite()
    assert 0.7 < activation_bytes(config) / measured < 1.5


def test_activation_checkpointing_needs_about_the_memory_that_a_backward_pass_has_at_its_peak():
    config = preset("17m", micro_batch_tokens=1024, activation_checkpointing=True)
    model = OSPModel(config.model, config.recipe, activation_checkpointing=True)
    ids_BL = torch.randint(8192, (1, 1024))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_BLV = model(ids_BL)
        loss = torch.nn.functional.cross_entropy(logits_BLV.float().flatten(0, 1), ids_BL.flatten())
        del logits_BLV
        loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    measured = peak - 8 * sum(parameter.numel() for parameter in model.parameters())
    assert 0.7 < activation_bytes(config) / measured < 1.5
    assert measured < activation_bytes(replace(config, activation_checkpointing=False)) * 0.7


def test_more_devices_take_less_memory_and_time():
    rows = make_plan(PRESETS["135m"], tflops=100)["devices"]
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    assert rows[0]["hours"] == pytest.approx(8 * rows[3]["hours"])
    sizes = [row["optimizer_bytes"] for row in rows]
    # Two devices share everything; from four on, a table (vocabulary x width, two moments) stays whole on one.
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=1e-2)
    assert all(
        2 * 4 * 49_152 * 576 < size < 1.01 * 2 * 4 * 49_152 * 576 + sizes[0] / count
        for size, count in zip(sizes[2:], (4, 8), strict=True)
    )
    assert all(
        row["bytes"] == sum(row[f"{of}_bytes"] for of in ("parameter", "gradient", "optimizer", "activation"))
        for row in rows
    )


def test_the_command_plans_without_data():
    result = CliRunner().invoke(train_command, ["--preset", "1.4b", "--plan", "--tflops", "400"])
    assert result.exit_code == 0, result.output
    assert "1,415,677,952 exported" in result.output
    result = CliRunner().invoke(train_command, ["--preset", "tiny", "--plan", "--json"])
    plan = json.loads(result.output)
    assert plan["tokens"] == 100 * 1024
    assert plan["tflops"] > 0


def test_without_a_plan_data_and_out_are_needed():
    result = CliRunner().invoke(train_command, ["--preset", "tiny"])
    assert result.exit_code == 2
    assert "--data and --out are needed" in result.output

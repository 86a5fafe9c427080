import itertools

import pytest
import torch

from trainer.config import RECIPES, ConfigError, ModelConfig, TrainConfig
from trainer.model import OSPModel
from trainer.muon import NEWTON_SCHULZ, Muon
from trainer.optimizer import learning_rate_share, make_optimizers, parameter_groups, set_learning_rate

SHAPE = ModelConfig(96, 48, 80, num_layers=2, num_heads=4, context_length=32)


def names_in(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_muon_gets_every_matrix_of_the_body_and_both_projections():
    model = OSPModel(SHAPE, "osp")
    muon, adam = make_optimizers(model, TrainConfig(SHAPE))
    assert isinstance(muon, Muon)
    got = names_in(model, [p for group in muon.param_groups for p in group["params"]])
    block = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    block += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert got == {f"layers.{i}.{name}.weight" for i in range(2) for name in block} | {
        "embed_projection.weight",
        "head_projection.weight",
    }
    rest = names_in(model, [p for group in adam.param_groups for p in group["params"]])
    assert rest == {name for name, _ in model.named_parameters()} - got


def test_muon_has_the_papers_settings():
    muon, _ = make_optimizers(OSPModel(SHAPE, "osp"), TrainConfig(SHAPE, weight_decay=0.01))
    assert {key: muon.defaults[key] for key in ("momentum", "ns_steps", "eps")} == {
        "momentum": 0.95,
        "ns_steps": 5,
        "eps": 1e-8,
    }
    assert NEWTON_SCHULZ == (3.4445, -4.7750, 2.0315)
    assert muon.param_groups[0]["weight_decay"] == 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_newton_schulz_computes_in_the_type_that_is_set(dtype):
    muon, _ = make_optimizers(OSPModel(SHAPE, "osp"), TrainConfig(SHAPE, newton_schulz_dtype=dtype))
    assert muon.dtype == getattr(torch, dtype)


def test_newton_schulz_in_another_type_is_refused():
    with pytest.raises(ConfigError, match=r"newton_schulz_dtype.*'float16'"):
        TrainConfig(SHAPE, newton_schulz_dtype="float16")


def test_the_adam_twin_uses_adam_for_everything():
    model = OSPModel(SHAPE, "adam")
    (adam,) = make_optimizers(model, TrainConfig(SHAPE, recipe="adam"))
    assert isinstance(adam, torch.optim.AdamW)
    assert sum(len(group["params"]) for group in adam.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_is_in_one_group_of_one_optimizer(recipe):
    model = OSPModel(SHAPE, recipe)
    optimizers = make_optimizers(model, TrainConfig(SHAPE, recipe=recipe))
    optimized = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize(
    ("recipe", "tables", "matrices"),
    [("adam", 0, 0), ("muon-only", 2, 14), ("muon", 0, 14), ("muon+ssnorm", 0, 14), ("muon+embproj", 0, 16)],
)
def test_what_muon_trains_in_the_ablations(recipe, tables, matrices):
    model = OSPModel(SHAPE, recipe)
    optimizers = make_optimizers(model, TrainConfig(SHAPE, recipe=recipe))
    muon = [p for o in optimizers if isinstance(o, Muon) for group in o.param_groups for p in group["params"]]
    names = names_in(model, muon)
    assert len(names & {"embed_tokens.weight", "lm_head.weight"}) == tables
    assert len(names) == tables + matrices


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match=r"'sgd'.*muon\+ssnorm"):
        TrainConfig(SHAPE, recipe="sgd")


def test_a_module_that_the_groups_would_list_twice_is_refused():
    model = OSPModel(SHAPE, "osp")
    model.layers[0].self_attn.q_proj.weight = model.lm_head.weight
    with pytest.raises(RuntimeError, match="exactly once"):
        parameter_groups(model)


def test_the_schedule_warms_up_stays_and_decays_to_almost_zero():
    config = TrainConfig(SHAPE, steps=1000, warmup_share=0.1, decay_share=0.2)
    shares = [learning_rate_share(step, config) for step in range(1000)]
    assert shares[0] == pytest.approx(0.01)
    assert shares[99:801] == [1.0] * 702
    assert shares[900] == pytest.approx(0.5)
    assert shares[999] == pytest.approx(1 / 200)
    assert all(a < b for a, b in itertools.pairwise(shares[:100]))


def test_every_group_follows_the_schedule():
    config = TrainConfig(SHAPE, matrix_lr=0.02, embedding_lr=0.004)
    optimizers = make_optimizers(OSPModel(SHAPE, "osp"), config)
    set_learning_rate(optimizers, 0.25)
    set_learning_rate(optimizers, 0.5)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.01, 0.002, 0.002]

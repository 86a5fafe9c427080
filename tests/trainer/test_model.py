import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from trainer.config import RECIPES, ConfigError, ModelConfig
from trainer.export import folded, llama_config, llama_state
from trainer.model import OSPModel, RMSNorm, SSNorm

SHAPE = ModelConfig(96, 48, 80, num_layers=3, num_heads=4, context_length=32)


def test_ssnorm_is_one_scalar_times_the_normalized_input():
    norm = SSNorm(eps=1e-6)
    assert [parameter.shape for parameter in norm.parameters()] == [torch.Size([])]
    assert norm.scale.item() == 1
    x = np.random.default_rng(0).normal(0, 3, (5, 48))
    with torch.no_grad():
        norm.scale.fill_(1.75)
        got = norm(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, 1.75 * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-12)


def test_ssnorm_gradient_is_that_of_the_formula():
    norm = SSNorm(eps=1e-6).double()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


def test_rmsnorm_equals_torch():
    norm = RMSNorm(48, eps=1e-6)
    x = torch.randn(5, 48)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (48,), norm.weight, 1e-6))


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_equal_transformers_after_folding(recipe):
    torch.manual_seed(1)
    model = OSPModel(SHAPE, recipe)
    perturb(model)
    llama = LlamaForCausalLM(llama_config(model))
    llama.load_state_dict(llama_state(folded(model)), strict=True)
    ids_BL = torch.randint(96, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BL), llama(ids_BL).logits, atol=1e-5, rtol=1e-5)


def test_the_projections_start_orthogonal():
    model = OSPModel(SHAPE, "osp")
    for projection in (model.embed_projection, model.head_projection):
        torch.testing.assert_close(projection.weight @ projection.weight.T, torch.eye(48), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "norm", "projections"),
    [
        ("adam", RMSNorm, 0),
        ("muon-only", RMSNorm, 0),
        ("muon", RMSNorm, 0),
        ("muon+ssnorm", SSNorm, 0),
        ("muon+embproj", RMSNorm, 2),
        ("osp", SSNorm, 2),
    ],
)
def test_each_recipe_has_its_own_parts(recipe, norm, projections):
    model = OSPModel(SHAPE, recipe)
    assert {type(m) for m in model.modules() if isinstance(m, RMSNorm | SSNorm)} == {norm}
    assert sum("projection" in name for name, _ in model.named_parameters()) == projections


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_recipes_start_from_the_same_numbers(recipe):
    states = []
    for name in (recipe, "adam"):
        torch.manual_seed(3)
        states.append(OSPModel(SHAPE, name).state_dict())
    other, adam = states
    shared = [name for name in adam if "norm" not in name]
    assert len(shared) == 2 + 7 * SHAPE.num_layers
    for name in shared:
        assert torch.equal(other[name], adam[name]), name


def test_a_token_never_sees_the_future():
    model = OSPModel(SHAPE, "osp")
    ids_BL = torch.randint(96, (1, 32))
    changed_BL = ids_BL.clone()
    changed_BL[0, 20] = (changed_BL[0, 20] + 1) % 96
    with torch.no_grad():
        difference_L = (model(ids_BL) - model(changed_BL)).abs().amax((0, 2))
    assert (difference_L[:20] == 0).all()
    assert (difference_L[20:] > 0).all()


def test_a_head_size_that_is_not_whole_or_not_even_is_refused():
    for width, heads in ((50, 4), (36, 4)):
        with pytest.raises(ConfigError, match="head size"):
            ModelConfig(96, width, 80, 2, heads, 32)


def perturb(model: torch.nn.Module) -> None:
    """Moves every parameter off its initial value, so that a scale of exactly 1 hides nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(torch.randn_like(parameter) * 0.05)

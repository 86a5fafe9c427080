"""The table and the plot of an ablation, from numbers made up."""

import numpy as np
import pytest
from matplotlib.image import imread

from trainer.ablation_report import PUBLISHED_KURTOSIS, TITLES, as_markdown, plot
from trainer.config import RECIPES

SETTINGS = {
    "model": {"num_layers": 4, "hidden_size": 256, "vocab_size": 4096},
    "steps": 1500,
    "batch_tokens": 8192,
    "seed": 7,
}


def measured(ratio=1.25):
    def times(perplexity):
        return None if ratio is None else perplexity * ratio

    return {
        "held_out_loss": 3.45678,
        "excess_kurtosis": {"in_context": 0.0423, "single_tokens": 1234.5},
        "perplexity": {"16-bit": 40.0, "w4a4": times(40.0), "w4a4-ffn": 44.0, "w4a4-token": 42.0},
        "ratio": {"w4a4": ratio, "w4a4-ffn": 1.1, "w4a4-token": 1.05},
        "curve": [[20, 0.5], [40, None if ratio is None else 0.75]],
    }


def test_every_number_stands_in_its_column():
    table = as_markdown({"settings": SETTINGS, "recipes": {"osp": measured(), "adam": measured(None)}})
    size, _, *rows = table.splitlines()
    assert size == "4 layers of width 256, 4,096 tokens of vocabulary; 1,500 steps of 8,192 tokens, seed 7."
    headings, _, adam, osp = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert dict(zip(headings, osp, strict=True)) == {
        "recipe": "OSP (all)",
        "held-out loss": "3.4568",
        "excess kurtosis: the paper's": "0.04",
        "here, single tokens": "1,234.50",
        "here, in context": "0.042",
        "perplexity: 16-16-16": "40.00",
        "4-4-4": "50.00 (1.250 x)",
        "4-4-4, FFN Hadamard": "44.00 (1.100 x)",
        "4-4-4, per channel and token": "42.00 (1.050 x)",
    }
    assert adam[0] == "Adam"  # the paper's order, whatever the order of the result
    assert adam[headings.index("4-4-4")] == "not finite"


def test_every_recipe_has_a_title_and_a_published_number():
    assert list(TITLES) == list(PUBLISHED_KURTOSIS) == list(RECIPES)


@pytest.mark.parametrize("ratio", [1.25, None])
def test_the_plot_draws_what_is_there(tmp_path, ratio):
    def picture(recipes):
        plot({"settings": SETTINGS, "recipes": recipes}, tmp_path / "plot.png")
        return imread(tmp_path / "plot.png")

    one, two = picture({"osp": measured()}), picture({"osp": measured(), "adam": measured(ratio)})
    assert one.shape == two.shape
    assert np.abs(one - two).mean() > 0.001

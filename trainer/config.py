"""What to train and how: typed settings and the presets."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Recipe = Literal["adam", "muon-only", "muon", "muon+ssnorm", "muon+embproj", "osp"]
"""The paper's six, by their names here; `RECIPES` says what each is made of."""


@dataclass(frozen=True, slots=True)
class RecipeParts:
    """What a recipe is made of. Each part is a step from the plain Llama trained with AdamW towards OSP.

    Attributes:
        muon_matrices: Muon trains the matrices of the blocks, and the projections.
        muon_tables: Muon trains embedding and head too.
        single_scale_norms: norms have one scalar, not a gain a channel.
        embedding_projections: a square matrix after the embedding, and one before the head.
    """

    muon_matrices: bool = True
    muon_tables: bool = False
    single_scale_norms: bool = False
    embedding_projections: bool = False

    @property
    def plain(self) -> bool:
        """Whether the model is a plain Llama without folding."""
        return not (self.single_scale_norms or self.embedding_projections)


RECIPES: dict[Recipe, RecipeParts] = {
    "adam": RecipeParts(muon_matrices=False),
    "muon-only": RecipeParts(muon_tables=True),  # the paper's "Muon without Adam"
    "muon": RecipeParts(),
    "muon+ssnorm": RecipeParts(single_scale_norms=True),
    "muon+embproj": RecipeParts(embedding_projections=True),
    "osp": RecipeParts(single_scale_norms=True, embedding_projections=True),
}


CHANGEABLE = frozenset(
    {
        "matrix_lr",
        "embedding_lr",
        "micro_batch_tokens",
        "eval_tokens",
        "eval_every",
        "checkpoint_every",
        "keep_checkpoints",
        "skip_limit",
        "newton_schulz_dtype",
        "device",
        "compile",
        "activation_checkpointing",
        "deterministic",
    }
)
"""Settings that may differ when a run is resumed."""


class ConfigError(ValueError):
    """A setting that makes no sense, alone or beside another; the message names it."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama. Sizes are counts of elements; every query head has its own key/value head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    context_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads must give a whole, even head size"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run. The learning rate rises linearly, stays, and falls linearly to zero (warm-up, stable, decay).

    Attributes:
        batch_tokens: tokens an optimizer step; a multiple of the model's context length.
        matrix_lr: learning rate of the matrices of the body and both embedding projections. Muon's update is scaled to
            AdamW's RMS, so one value serves both.
        embedding_lr: learning rate of the embedding, the head and the norms.
        micro_batch_tokens: tokens that go through the model at a time; gradients of a step add up over them. Bounds
            memory and does not change what is computed, but for rounding.
        held_out: share of the documents that training never sees.
        eval_tokens: held-out tokens that each evaluation reads, at most.
        keep_checkpoints: how many of the newest stay on disk, beside the best.
        newton_schulz_dtype: what Muon orthogonalizes in, "bfloat16" or "float32".
        skip_limit: steps in a row with a loss or gradient that is not finite; so many end the run, fewer are skipped.
        autocast: run matrix products in bfloat16; parameters and optimizer state stay float32.
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        compile: run the model through torch.compile.
        activation_checkpointing: keep only what enters each block, and compute the rest again in the backward pass.
        deterministic: a GPU takes only algorithms that give the same bits each time; a CPU has no others.
    """

    model: ModelConfig
    recipe: Recipe = "osp"
    steps: int = 1000
    batch_tokens: int = 4096
    micro_batch_tokens: int = 8192
    matrix_lr: float = 2e-3
    embedding_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.02
    decay_share: float = 0.3
    gradient_clip: float = 1.0
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    held_out: float = 0.02
    eval_tokens: int = 16_384
    eval_every: int = 200
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    skip_limit: int = 3
    autocast: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_tokens % self.model.context_length:
            raise ConfigError(
                f"batch_tokens {self.batch_tokens} is not a multiple of the context length {self.model.context_length}"
            )
        for name in ("steps", "eval_every", "checkpoint_every", "keep_checkpoints", "skip_limit", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.recipe not in RECIPES:
            raise ConfigError(f"unknown recipe {self.recipe!r}; known: {', '.join(RECIPES)}")
        if self.newton_schulz_dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"newton_schulz_dtype must be bfloat16 or float32, is {self.newton_schulz_dtype!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, is {self.device!r}")
        for name in ("matrix_lr", "embedding_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a positive number, is {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """As written into checkpoints and osp.json."""
        return asdict(self)


PRESETS = {
    # A minute or less on any machine: for tests and for trying out a corpus.
    "tiny": TrainConfig(
        ModelConfig(512, 64, 160, num_layers=2, num_heads=2, context_length=64),
        steps=100,
        batch_tokens=1024,
        matrix_lr=4e-3,
        embedding_lr=4e-3,
        eval_every=50,
    ),
    # The bundled model: 5.1 million parameters.
    "demo": TrainConfig(
        ModelConfig(4096, 256, 640, num_layers=4, num_heads=4, context_length=512),
        steps=3500,
        batch_tokens=4096,
        matrix_lr=3e-3,
        autocast=True,
    ),
    "17m": TrainConfig(
        ModelConfig(8192, 384, 1024, num_layers=6, num_heads=6, context_length=1024),
        steps=20_000,
        batch_tokens=16_384,
        autocast=True,
    ),
    "135m": TrainConfig(
        ModelConfig(49_152, 576, 1536, num_layers=30, num_heads=9, context_length=2048),
        steps=100_000,
        batch_tokens=262_144,
        matrix_lr=1e-3,
        embedding_lr=1e-3,
        autocast=True,
    ),
    # The shape and learning rate of the paper (arXiv 2506.19697).
    "1.4b": TrainConfig(
        ModelConfig(49_152, 2048, 5504, num_layers=24, num_heads=16, context_length=2048),
        steps=1_000_000,
        batch_tokens=1_048_576,
        matrix_lr=5e-4,
        embedding_lr=5e-4,
        autocast=True,
    ),
}


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Which settings differ, as "steps: 20 then, 30 now"; both as `TrainConfig.to_dict` gives them, or parts of that.

    What an older version wrote lacks newer settings. It did what their defaults do, so that they are not looked at.
    """
    before, after = _flat(then), _flat(now)
    return [
        f"{name}: {before[name]} then, {value} now"
        for name, value in after.items()
        if name not in ignored and before.get(name, value) != value
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings["model"], **{name: value for name, value in settings.items() if name != "model"}}


def preset(name: str, **changes: Any) -> TrainConfig:
    """The preset called `name`, with `changes` to fields of `TrainConfig` or `ModelConfig`; None changes nothing.

    Raises:
        ConfigError: no such preset, or settings that do not fit together.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    config = PRESETS[name]
    given = {field: value for field, value in changes.items() if value is not None}
    shape = {field.name: given.pop(field.name) for field in fields(ModelConfig) if field.name in given}
    return replace(config, **{"model": replace(config.model, **shape), **given})

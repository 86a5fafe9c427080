"""How a model is loaded, without a server."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders

from quant.llama import CheckpointError
from runtime.server.catalog import ModelCatalog
from runtime.server.model_loading import load_models
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import TokenizerError


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy whose tokenizer may be changed."""
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    (copy / "osp.json").unlink()
    return copy


def unknown_family(model: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(model / "tokenizer.json"))


def bad_end_token(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": "END"}')


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def no_weights(model: Path) -> None:
    (model / "osp.safetensors").unlink()


@pytest.mark.parametrize("damage", [unknown_family, bad_end_token, no_tokenizer, no_weights])
def test_a_model_that_cannot_be_loaded_leaves_no_engine_behind(model: Path, damage: Callable[[Path], None]) -> None:
    damage(model)
    before = set(threading.enumerate())
    with pytest.raises((TokenizerError, CheckpointError)):
        list(load_models(ServerSettings(model=str(model)), Telemetry()))
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("quality", ["good", ["good"], 5, None, {"ratio": 1.5}])
def test_the_card_has_a_quality_only_where_it_is_an_object(model: Path, quality: object) -> None:
    (model / "osp.json").write_text(json.dumps({"quality": quality}))
    [served] = load_models(ServerSettings(model=str(model)), Telemetry())
    asyncio.run(ModelCatalog([served]).shutdown(0))
    assert served.card.quality == (quality if isinstance(quality, dict) else None)

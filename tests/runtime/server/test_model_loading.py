"""Names of models, and the chat templates that they come with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quant.llama import CheckpointError
from runtime.model_store import ModelNotFoundError
from runtime.server.model_loading import choose_models, load_models, read_chat_template
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry


def test_names(checkpoint: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()

    def names(*models: str, **settings: Any) -> list[str]:
        return [choice.name for choice in choose_models(ServerSettings(model=models, **settings))]

    assert names(str(checkpoint), str(full)) == ["tiny", "full"]
    assert names(f"a={checkpoint}", f"b={checkpoint}") == ["a", "b"]
    assert names(str(checkpoint), served_model_name="cat") == ["cat"]
    assert names(f"org/a={checkpoint}", "demo") == ["org/a", "demo"]
    with pytest.raises(ModelNotFoundError, match="two models would be called 'tiny'"):
        names(str(checkpoint), f"tiny={full}")


TEMPLATES = [
    {"chat_template": "plain {{ messages }}"},
    {"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]},
    {"chat_template": [{"name": "rag", "template": "other"}]},
    {"chat_template": None},
    {},
]


@pytest.mark.parametrize("config", TEMPLATES)
@pytest.mark.parametrize("jinja", [None, "from the file {{ messages }}"])
def test_the_chat_template_is_the_one_that_transformers_takes(
    checkpoint: Path, tmp_path: Path, config: dict[str, Any], jinja: str | None
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    oracle = AutoTokenizer.from_pretrained(tmp_path).chat_template
    if isinstance(oracle, dict):
        oracle = oracle.get("default")
    assert read_chat_template(tmp_path) == oracle


@pytest.mark.parametrize("config", ['{"chat_template": 5}', '{"chat_template": ', "[" * 100_000, b"\xff"])
def test_a_damaged_tokenizer_config_is_named(tmp_path: Path, config: str | bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        read_chat_template(tmp_path)


def test_a_chat_template_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("mine {{ messages }}")
    settings = ServerSettings(model=(str(checkpoint),), chat_template=file, engine="reference")
    [served] = load_models(settings, Telemetry())
    asyncio.run(served.engine.shutdown(0))
    assert served.chat_template == "mine {{ messages }}"
    missing = ServerSettings(model=(str(checkpoint),), chat_template=tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match=r"chat template .*none cannot be read: No such file"):
        list(load_models(missing, Telemetry()))

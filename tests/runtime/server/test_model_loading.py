"""Names of models, and the chat templates that they come with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from transformers import AutoTokenizer

from quant.llama import CheckpointError
from runtime.model_store import ModelNotFoundError
from runtime.server.catalog import ServedModel
from runtime.server.model_loading import choose_models, load_models, read_chat_templates
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import Tokenizer


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
@pytest.mark.parametrize("more", [[], ["tool_use", "rag"]])
@pytest.mark.parametrize("tools", [False, True])
def test_the_chat_template_is_the_one_that_transformers_takes(
    checkpoint: Path, tmp_path: Path, config: dict[str, Any], jinja: str | None, more: list[str], tools: bool
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    for name in more:
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name} from its file")
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    try:
        expected = oracle.get_chat_template(tools=[{}] if tools else None)
    except ValueError:
        expected = None
    found = ServedModel(
        "x",
        ScriptedEngine(lambda _: ()),
        Tokenizer.load(checkpoint),
        Telemetry(),
        chat_templates=read_chat_templates(tmp_path),
    )
    assert found.chat_template(tools=tools) == expected
    assert found.card.chat == (found.chat_template(tools=False) is not None)


@pytest.mark.parametrize("config", ['{"chat_template": 5}', '{"chat_template": ', "[" * 100_000, b"\xff"])
def test_a_damaged_tokenizer_config_is_named(tmp_path: Path, config: str | bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        read_chat_templates(tmp_path)


def test_a_chat_template_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("mine {{ messages }}")
    settings = ServerSettings(model=(str(checkpoint),), chat_template=file, engine="reference")
    [served] = load_models(settings, Telemetry())
    asyncio.run(served.engine.shutdown(0))
    assert served.chat_templates == {"default": "mine {{ messages }}"}
    missing = ServerSettings(model=(str(checkpoint),), chat_template=tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match=r"chat template .*none cannot be read: No such file"):
        list(load_models(missing, Telemetry()))

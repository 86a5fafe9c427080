"""From the names on the command line to models that can be served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.format import read_config, read_provenance
from quant.llama import CheckpointError
from runtime.engine.registry import EngineOptions, load_engine
from runtime.engine.scheduler import SchedulerLimits
from runtime.model_store import ModelNotFoundError, recorded_quality, resolve_model
from runtime.server.catalog import ServedModel
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model that is to be served: the name for clients, and where it lies."""

    name: str
    path: Path


def choose_models(settings: ServerSettings) -> list[ModelChoice]:
    """The models that the settings name, found (and downloaded) but not read.

    Raises:
        ModelNotFoundError: one does not exist, or two would go by one name.
    """
    choices: dict[str, ModelChoice] = {}
    for text in settings.model:
        given, separator, model = text.partition("=")
        name, model = (given, model) if separator else (None, text)
        path = resolve_model(model)
        name = settings.served_model_name or name or _short_name(model, path)
        if name in choices:
            raise ModelNotFoundError(f"two models would be called {name!r}; give them names of their own: NAME=MODEL")
        choices[name] = ModelChoice(name, path)
    return list(choices.values())


def load_models(settings: ServerSettings, telemetry: Telemetry) -> Iterator[ServedModel]:
    """Reads and starts the models of the settings, one after the other. Takes as long as reading their weights.

    Raises:
        ModelNotFoundError, CheckpointError, TokenizerError: a model does not exist or cannot be used.
        UnknownEngineError, NativeLibraryError, KernelError: see `load_engine`.
    """
    override = _read_override(settings.chat_template)
    for choice in choose_models(settings):
        yield _load(choice, settings, telemetry, override)


def _load(choice: ModelChoice, settings: ServerSettings, telemetry: Telemetry, template: str | None) -> ServedModel:
    _, quantization = read_config(choice.path)
    quality = recorded_quality(read_provenance(choice.path))
    tokenizer = Tokenizer.load(choice.path)
    chat_templates = {"default": template} if template is not None else read_chat_templates(choice.path)
    limits = SchedulerLimits(max_waiting=settings.max_waiting, step_timeout_s=settings.stall_timeout)
    options = EngineOptions(
        threads=settings.threads,
        kernel=settings.kernel,
        stream_interval_s=settings.stream_interval,
        onnx_provider=settings.onnx_provider,
        vllm=settings.vllm,
    )
    # Last, when nothing else can fail: the engine starts a thread, which somebody would have to end.
    engine = load_engine(settings.engine, choice.path, limits, options)
    scheme = (quantization or {}).get("scheme")
    return ServedModel(
        choice.name, engine, tokenizer, telemetry, scheme=scheme, quality=quality, chat_templates=chat_templates
    )


def read_chat_templates(directory: Path) -> dict[str, str]:
    """The chat templates of a checkpoint by name, found as transformers finds them; the usual one is "default".

    `chat_template.jinja` and `additional_chat_templates/NAME.jinja` go before `tokenizer_config.json`.

    Raises:
        CheckpointError: a file cannot be read, or has something else in the template's place.
    """
    files = {path.stem: f"{TEMPLATE_FOLDER}/{path.name}" for path in (directory / TEMPLATE_FOLDER).glob("*.jinja")}
    if (directory / TEMPLATE_FILE).exists():
        files["default"] = TEMPLATE_FILE
    if files:
        return {name: _read(directory, file) for name, file in files.items()}
    if not (directory / "tokenizer_config.json").exists():
        return {}
    try:
        config = json.loads(_read(directory, "tokenizer_config.json"))
    except (ValueError, RecursionError):
        raise CheckpointError(directory, "tokenizer_config.json cannot be read: it is no JSON") from None
    return _named_templates(directory, config.get("chat_template") if isinstance(config, dict) else None)


def _named_templates(directory: Path, given: Any) -> dict[str, str]:
    """What stands in tokenizer_config.json: one text, or a list of objects with `name` and `template`."""
    templates = {} if given is None else {"default": given}
    if isinstance(given, list):
        templates = {str(item.get("name")): item.get("template") for item in given if isinstance(item, dict)}
    if not all(isinstance(template, str) for template in templates.values()):
        raise CheckpointError(directory, "tokenizer_config.json has a chat_template that is no text")
    return templates


def _read_override(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ModelNotFoundError(f"the chat template {file} cannot be read: {reason}") from None


def _read(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(directory, f"{name} cannot be read: {error}") from None


def _short_name(model: str, path: Path) -> str:
    """What clients call a model by default: its name, or the last part of its directory."""
    return path.resolve().name if Path(model).expanduser().is_dir() else model

"""The models that a server serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quant.format import read_config, read_provenance
from runtime.engine.base import Engine
from runtime.engine.registry import EngineOptions, load_engine
from runtime.engine.scheduler import SchedulerLimits
from runtime.model_store import recorded_quality, resolve_model
from runtime.server.errors import ApiError, shortened
from runtime.server.schemas import ModelCard
from runtime.server.settings import ServerSettings
from runtime.server.telemetry import Telemetry
from runtime.text.tokenizer import Tokenizer


class ServedModel:
    """An engine with its tokenizer, under the name that clients use.

    Attributes:
        telemetry: where this model's sequences are recorded.
        card: what clients are told about it.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        telemetry: Telemetry,
        *,
        scheme: dict[str, Any] | None = None,
        quality: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self.telemetry = telemetry.of_model(name, engine)
        self.card = ModelCard(
            id=name,
            created=int(time.time()),
            max_model_len=engine.info.context_length,
            engine=engine.info.engine,
            precision=engine.info.precision,
            scheme=scheme,
            quality=quality,
        )


def load_model(settings: ServerSettings, telemetry: Telemetry) -> ServedModel:
    """Finds, reads and starts the model that the settings name. Takes as long as reading its weights.

    Raises:
        ModelNotFoundError, CheckpointError, TokenizerError: it does not exist or cannot be used.
        UnknownEngineError, NativeLibraryError, KernelError: see `load_engine`.
    """
    path = resolve_model(settings.model)
    name = settings.served_model_name or _short_name(settings.model, path)
    _, quantization = read_config(path)
    quality = recorded_quality(read_provenance(path))
    tokenizer = Tokenizer.load(path)
    # Last, when nothing else can fail: the engine starts a thread, which somebody would have to end.
    limits, options = (
        SchedulerLimits(max_waiting=settings.max_waiting),
        EngineOptions(settings.threads, settings.kernel),
    )
    engine = load_engine(settings.engine, path, limits, options)
    scheme = (quantization or {}).get("scheme")
    return ServedModel(name, engine, tokenizer, telemetry, scheme=scheme, quality=quality)


def _short_name(model: str, path: Path) -> str:
    """What clients call a model by default: its name, or the last part of its directory."""
    return path.resolve().name if Path(model).expanduser().is_dir() else model


class ModelCatalog:
    """Finds the model that a request means."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        """The first model is the one that requests without a `model` get."""
        self._models = {model.name: model for model in models}

    def pick(self, name: str | None) -> ServedModel:
        """The model called `name`; raises `ApiError` 404 where there is none."""
        if name is None:
            return next(iter(self))
        if name not in self._models:
            message = f"the model {shortened(name)!r} does not exist; served here: {', '.join(self._models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    async def check_health(self) -> None:
        """Raises `EngineDeadError` unless every engine can make progress."""
        for model in self:
            await model.engine.check_health()

    async def shutdown(self, drain_s: float) -> None:
        """Stops admitting; lets live requests finish for up to `drain_s` seconds, then aborts them."""
        await asyncio.gather(*(model.engine.shutdown(drain_s) for model in self))

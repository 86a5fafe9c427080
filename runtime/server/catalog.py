"""The models that a server serves, and whether it serves them yet, or still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from runtime.engine.base import Engine, EngineLostError
from runtime.server.errors import RETRY_SOON, ApiError, shortened
from runtime.server.schemas import ModelCard
from runtime.server.telemetry import Telemetry
from runtime.server.telemetry_engine import MeteredEngine
from runtime.text.tokenizer import Tokenizer


class ServedModel:
    """An engine with its tokenizer, under the name that clients use.

    Attributes:
        telemetry: where this model's sequences are recorded.
        card: what clients are told about it.
        chat_templates: the Jinja texts that make a prompt of a chat, by name: "default", and where the checkpoint has
            a template of its own for conversations with tools, "tool_use".
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
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.chat_templates = dict(chat_templates or {})
        self.telemetry = telemetry.of_model(name, engine)
        self.engine: Engine = MeteredEngine(engine, self.telemetry)
        self.card = ModelCard(
            id=name,
            created=int(time.time()),
            max_model_len=engine.info.context_length,
            engine=engine.info.engine,
            precision=engine.info.precision,
            scheme=scheme,
            quality=quality,
            chat="default" in self.chat_templates,
        )

    def chat_template(self, *, tools: bool) -> str | None:
        """The template for a conversation, as transformers chooses it; None: there is none."""
        return (self.chat_templates.get("tool_use") if tools else None) or self.chat_templates.get("default")


class Phase(StrEnum):
    """Where in its life a server is."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class ModelCatalog:
    """Finds the model that a request means.

    Attributes:
        phase: requests are taken while `SERVING` only.
        lost: why no engine of this process will ever serve a model again; None: none is lost.
    """

    def __init__(self, models: Iterable[ServedModel] | None = None) -> None:
        """The first model is the one that requests without a `model` get. None: they will come by `add`."""
        self._models: dict[str, ServedModel] = {}
        self.phase = Phase.LOADING
        self.lost: EngineLostError | None = None
        if models is not None:
            for model in models:
                self.add(model)
            self.phase = Phase.SERVING

    def add(self, model: ServedModel) -> None:
        """Adds a model under a name of its own."""
        self._models[model.name] = model

    def require_serving(self) -> None:
        """Raises `ApiError` 503 unless requests are taken."""
        if self.phase is Phase.LOADING:
            raise ApiError(503, "the server is still loading its models", code="model_loading", headers=RETRY_SOON)
        if self.phase is Phase.DRAINING:
            message = "the server is shutting down and takes no new requests"
            raise ApiError(503, message, code="shutting_down", headers=RETRY_SOON)

    def pick(self, name: str | None) -> ServedModel:
        """The model called `name`; raises `ApiError`: 404 where there is none, 503 while none is served."""
        self.require_serving()
        if name is None:
            return next(iter(self))
        if name not in self._models:
            message = f"the model {shortened(name)!r} does not exist; served here: {', '.join(self._models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))

    async def check_health(self) -> None:
        """Raises `EngineDeadError` unless every engine can make progress. Engines that drain end by and by."""
        if self.phase is Phase.DRAINING:
            return
        # All of them: a sick one fails its clients when it is asked.
        outcomes = await asyncio.gather(*(model.engine.check_health() for model in self), return_exceptions=True)
        self.lost = next((outcome for outcome in outcomes if isinstance(outcome, EngineLostError)), None)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def shutdown(self, drain_s: float) -> None:
        """Stops admitting; lets live requests finish for up to `drain_s` seconds, then aborts them."""
        self.phase = Phase.DRAINING
        await asyncio.gather(*(model.engine.shutdown(drain_s) for model in self))

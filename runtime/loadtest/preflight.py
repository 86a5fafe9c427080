"""Finds out, before any load, whether a server can be tested, and what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from runtime.loadtest.client import refusal, stream_completion
from runtime.loadtest.endpoint import OSP, Endpoint, EndpointError
from runtime.loadtest.record import RequestRecord
from runtime.loadtest.server_metrics import read_metrics
from runtime.loadtest.workload import Turn


def open_session(headers: Mapping[str, str], timeout_s: float) -> aiohttp.ClientSession:
    """A client without a limit of connections; a request may take `timeout_s` seconds as a whole."""
    return aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        # A test of this machine's server does not go through a proxy that the environment names for others.
        trust_env=False,
    )


async def find_endpoint(
    session: aiohttp.ClientSession,
    url: str,
    model: str | None,
    headers: Mapping[str, str],
    extra_body: Mapping[str, Any],
) -> Endpoint:
    """The endpoint at `url`, after it has answered a request of two tokens.

    Args:
        url: with or without `/v1` at its end.
        model: None takes the first that the server names.

    Raises:
        EndpointError: it cannot be reached, refuses the key, speaks another language, has no such model, or fails.
    """
    base = url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    card = _pick(await _models(session, base), model, base)
    kind = str(card.get("owned_by") or "unknown")
    info = await _engine_info(session, base, kind, card["id"])
    endpoint = Endpoint(
        url=base,
        model=card["id"],
        kind=kind,
        context_length=card.get("max_model_len"),
        vocab_size=int(info["vocab_size"]) if "vocab_size" in info else None,
        engine=card.get("engine") or kind,
        precision=card.get("precision"),
        kernel=info.get("kernel") or None,  # empty where an engine has no kernels to choose from
        headers=dict(headers),
        extra_body=dict(extra_body),
    )
    record = RequestRecord(0.0)
    body = endpoint.request_body(Turn((1, 2, 3), 2, ignore_eos=True), prefix_cache=False)
    await stream_completion(session, f"{base}/completions", body, record)
    if record.error is not None:
        raise EndpointError(f"{base} does not complete a prompt of token ids: {record.error}")
    return endpoint


async def _models(session: aiohttp.ClientSession, base: str) -> list[dict[str, Any]]:
    try:
        async with session.get(f"{base}/models") as response:
            if response.status in (401, 403):
                said = await refusal(response)
                raise EndpointError(f"{base} refuses the key ({said}); set OPENAI_API_KEY to one that it takes")
            if response.status != 200:
                raise EndpointError(f"{base}/models: {await refusal(response)}; is this an OpenAI-compatible server?")
            answer = json.loads(await response.text())
            return [card for card in answer["data"] if isinstance(card["id"], str)]
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error) or "it does not answer in time"
        raise EndpointError(f"{base} cannot be reached: {reason}; does a server run there?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(f"{base}/models is no list of models; is this an OpenAI-compatible server?") from error


def _pick(cards: list[dict[str, Any]], model: str | None, base: str) -> dict[str, Any]:
    named = [card for card in cards if model in (None, card["id"])]
    if named:
        return named[0]
    served = ", ".join(card["id"] for card in cards) or "nothing"
    raise EndpointError(f"{base} does not serve {model or 'any model'}; it serves {served}")


async def _engine_info(session: aiohttp.ClientSession, base: str, kind: str, model: str) -> Mapping[str, str]:
    """What an osp server says of the model's engine, in a metric's labels; {} where it says nothing."""
    metrics = await read_metrics(session, base.removesuffix("/v1"), model) if kind == OSP else None
    return metrics.labels.get("osp_engine_info", {}) if metrics else {}

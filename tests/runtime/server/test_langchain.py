"""LangChain's OpenAI models, completions and chats, over a real socket: they get what OpenAI's own client gets."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from server_process import ServerProcess

PROMPT = "Once upon a time"
ON = {"ignore_eos": True}


@pytest.fixture
def options(chat_server: ServerProcess) -> dict[str, Any]:
    return {
        "base_url": f"{chat_server.url}/v1", "api_key": "none", "model": "chatty", "temperature": 0.7, "seed": 3,
        "max_tokens": 12, "max_retries": 0, "timeout": 60, "extra_body": ON,
    }  # fmt: skip


async def asked(model: Any) -> tuple[Any, list[Any]]:
    """The answer at once, and in pieces; in one event loop, as the client keeps its connections."""
    return await model.ainvoke(PROMPT), [piece async for piece in model.astream(PROMPT)]


def test_completions(options: dict[str, Any], chat_client: openai.OpenAI) -> None:
    own = chat_client.completions.create(
        model="chatty", prompt=PROMPT, max_tokens=12, temperature=0.7, seed=3, extra_body=ON
    )
    expected = own.choices[0].text
    llm = OpenAI(**options)
    assert llm.invoke(PROMPT) == expected
    assert "".join(llm.stream(PROMPT)) == expected
    answer, parts = asyncio.run(asked(llm))
    assert answer == "".join(parts) == expected
    together = chat_client.completions.create(
        model="chatty", prompt=[PROMPT, PROMPT], max_tokens=12, temperature=0.7, seed=3, extra_body=ON
    )
    assert llm.batch([PROMPT, PROMPT]) == [choice.text for choice in together.choices]


def test_chats(options: dict[str, Any], chat_client: openai.OpenAI) -> None:
    own = chat_client.chat.completions.create(
        model="chatty",
        messages=[{"role": "user", "content": PROMPT}],
        max_completion_tokens=12,
        temperature=0.7,
        seed=3,
        extra_body=ON,
    )
    expected = own.choices[0].message.content
    chat = ChatOpenAI(**options, stream_usage=True)
    whole = chat.invoke(PROMPT)
    assert whole.content == expected
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 12
    pieces = list(chat.stream(PROMPT))
    assert "".join(piece.content for piece in pieces) == expected
    assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == 12
    answer, parts = asyncio.run(asked(chat))
    assert answer.content == "".join(part.content for part in parts) == expected


def test_a_refusal_is_the_client_s_own_error(options: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        OpenAI(**{**options, "model": "nobody"}).invoke(PROMPT)

"""`/tokenize` and `/detokenize`, in vLLM's shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from chat_checkpoint import CHAT_CONTEXT
from server_process import ServerProcess
from transformers import PreTrainedTokenizerFast

HELLO = {"role": "user", "content": "Hello"}
TEXT = "The cat é 😀 <|im_end|>"


@pytest.fixture(scope="module")
def library(chat_checkpoint: Path) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_file(str(chat_checkpoint / "tokenizer.json"))
    library.encode_special_tokens = True
    return library


def post(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    # Not by httpx's own way to write JSON, which knows no half surrogate pairs.
    return httpx.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json"})


def test_a_text(chat_server: ServerProcess, library: tokenizers.Tokenizer) -> None:
    for special in (True, False):
        answer = post(chat_server, "/tokenize", prompt=TEXT, add_special_tokens=special, return_token_strs=True).json()
        expected = library.encode(TEXT, add_special_tokens=special)
        assert answer == {
            "count": len(expected.ids),
            "max_model_len": CHAT_CONTEXT,
            "tokens": expected.ids,
            "token_strs": expected.tokens,
        }
    assert post(chat_server, "/tokenize", model="chatty", prompt="").json()["tokens"] == [0]
    assert post(chat_server, "/tokenize", prompt="x").json()["token_strs"] is None


def test_a_conversation(chat_server: ServerProcess, chat_checkpoint: Path) -> None:
    oracle = PreTrainedTokenizerFast.from_pretrained(str(chat_checkpoint))
    for generation in (True, False):
        expected = oracle.apply_chat_template([HELLO], add_generation_prompt=generation, return_dict=False)
        answer = post(chat_server, "/tokenize", messages=[HELLO], add_generation_prompt=generation).json()
        assert answer["tokens"] == expected


def test_there_and_back(chat_server: ServerProcess, library: tokenizers.Tokenizer) -> None:
    ids = [*library.encode(TEXT).ids, library.token_to_id("<|im_start|>")]
    answer = post(chat_server, "/detokenize", tokens=ids).json()
    assert answer == {"prompt": library.decode(ids, skip_special_tokens=False)}
    assert answer["prompt"] == f"<|endoftext|>{TEXT}<|im_start|>"
    assert post(chat_server, "/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [HELLO]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "nope": 1}, "nope"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens.0"),
    ],
)
def test_what_cannot_be_is_named(chat_server: ServerProcess, path: str, body: dict[str, Any], param: str) -> None:
    response = post(chat_server, path, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_another_model_and_another_content_type(chat_server: ServerProcess) -> None:
    assert post(chat_server, "/tokenize", model="other", prompt="x").status_code == 404
    assert post(chat_server, "/detokenize", model="other", tokens=[1]).status_code == 404
    assert httpx.post(f"{chat_server.url}/tokenize", content=b'{"prompt": "x"}').status_code == 415

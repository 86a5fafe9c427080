"""An answer goes out when it is there."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
from served_engine import OPTIONS, START_S
from server_process import ServerProcess, running_server


def test_pieces_of_an_answer_do_not_wait_for_acknowledgements(chat_server: ServerProcess) -> None:
    # A client's kernel takes 40 ms to acknowledge what it has no answer to. The quickest of several requests counts:
    # the machine may be busy, but it is not busy always.
    with httpx.Client(base_url=chat_server.url) as client:
        client.get("/version")
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            client.post("/detokenize", json={"tokens": [5]})
            seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.025


def test_tokens_that_come_at_once_share_an_event_and_none_is_lost(checkpoint: Path, server: ServerProcess) -> None:
    # The shared server sends an event a token.
    body = {"prompt": "The cat", "max_tokens": 100, "seed": 3, "ignore_eos": True, "stream": True, "logprobs": 0}
    with running_server(str(checkpoint), *OPTIONS, start_s=START_S) as gathering:
        answers = [httpx.post(f"{url}/v1/completions", json=body, timeout=60) for url in (server.url, gathering.url)]
    one_by_one, gathered = (
        [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")] for answer in answers
    )
    # A hundred tokens of the tiny model take less than a second, which has fifty intervals.
    assert len(gathered) < len(one_by_one) == 100
    pieces = [[event["choices"][0] for event in events] for events in (gathered, one_by_one)]
    for field in ("tokens", "token_logprobs", "text_offset"):
        joined, single = ([item for piece in choice for item in piece["logprobs"][field]] for choice in pieces)
        assert joined == single
    joined, single = ("".join(piece["text"] for piece in choice) for choice in pieces)
    assert joined == single
    assert [piece["finish_reason"] for piece in pieces[0]] == [None] * (len(gathered) - 1) + ["length"]

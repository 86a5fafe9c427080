"""`/v1/completions` in full, as OpenAI's own client sees it over a real socket."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import httpx
import openai
import pytest
from chat_checkpoint import CHAT_CONTEXT
from server_process import ServerProcess

from runtime.text.tokenizer import Tokenizer

PROMPT = "Once upon a time"
ON = {"ignore_eos": True}


def create(client: openai.OpenAI, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    request = {"model": "chatty", "prompt": PROMPT, "max_tokens": 6, **options}
    return client.completions.create(**request, extra_body={**ON, **(extra or {})})


def texts(completion: Any) -> list[str]:
    return [choice.text for choice in completion.choices]


def streamed(client: openai.OpenAI, extra: dict[str, Any] | None = None, **options: Any) -> dict[int, str]:
    parts: dict[int, str] = defaultdict(str)
    for chunk in create(client, extra, stream=True, **options):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    return dict(sorted(parts.items()))


def test_several_choices_differ_and_repeat(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    completion = create(chat_client, n=4, seed=3, max_tokens=12)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert len(set(texts(completion))) == 4
    assert texts(completion) == texts(create(chat_client, n=4, seed=3, max_tokens=12))
    assert completion.usage.prompt_tokens == len(chat_tokenizer.encode(PROMPT)), "a prompt counts once"
    assert completion.usage.completion_tokens == 48


def test_choices_of_several_prompts_are_in_order(chat_client: openai.OpenAI) -> None:
    prompts = [PROMPT, "The cat"]
    together = create(chat_client, prompt=prompts, n=2, seed=5)
    alone = [create(chat_client, prompt=prompt, n=2, seed=5 + i) for i, prompt in enumerate(prompts)]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert texts(together) == texts(alone[0]) + texts(alone[1])


@pytest.mark.parametrize("options", [{"n": 4}, {"n": 2, "prompt": [PROMPT, "The cat"]}, {"n": 3, "echo": True}])
def test_streamed_choices_are_the_same(chat_client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = create(chat_client, seed=8, **options)
    assert streamed(chat_client, seed=8, **options) == dict(enumerate(texts(whole)))


def test_every_streamed_choice_ends_once(chat_client: openai.OpenAI) -> None:
    ends = [
        (choice.index, choice.finish_reason)
        for chunk in create(chat_client, n=4, stream=True)
        for choice in chunk.choices
        if choice.finish_reason is not None
    ]
    assert sorted(ends) == [(index, "length") for index in range(4)]


def test_usage_comes_once_and_only_when_asked(chat_client: openai.OpenAI) -> None:
    assert all(chunk.usage is None for chunk in create(chat_client, n=2, stream=True))
    chunks = list(create(chat_client, n=2, stream=True, stream_options={"include_usage": True}))
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    assert with_usage == chunks[-1:]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_continuous_usage_counts_the_tokens_of_a_choice(chat_client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = create(chat_client, n=2, stream=True, stream_options=options)
    counts: dict[int, list[int]] = defaultdict(list)
    for chunk in chunks:
        counts[chunk.choices[0].index].append(chunk.usage.completion_tokens)
    assert counts == {0: [1, 2, 3, 4, 5, 6], 1: [1, 2, 3, 4, 5, 6]}
    assert last.usage.completion_tokens == 12


def test_cached_tokens_are_told(chat_client: openai.OpenAI) -> None:
    prompt = [3 + i % 200 for i in range(100)]
    first = create(chat_client, prompt=prompt, max_tokens=1, extra={"cache_salt": "mine"}).usage
    again = create(chat_client, prompt=prompt, n=2, max_tokens=1, extra={"cache_salt": "mine"}).usage
    other = create(chat_client, prompt=prompt, max_tokens=1, extra={"cache_salt": "other"}).usage
    assert first.prompt_tokens_details.cached_tokens == other.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.prompt_tokens_details.cached_tokens < 100
    *_, last = create(
        chat_client, prompt=prompt, stream=True, stream_options={"include_usage": True}, extra={"cache_salt": "mine"}
    )
    assert last.usage.prompt_tokens_details == again.prompt_tokens_details


def test_echo_puts_the_prompt_in_front(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    plain = create(chat_client, seed=1)
    for prompt in (PROMPT, list(chat_tokenizer.encode(PROMPT))):
        echoed = create(chat_client, prompt=prompt, seed=1, echo=True)
        assert texts(echoed) == [PROMPT + texts(plain)[0]]
        assert echoed.usage == plain.usage


def test_echo_alone(chat_client: openai.OpenAI) -> None:
    completion = create(chat_client, prompt=[PROMPT, "The cat"], echo=True, max_tokens=0)
    assert texts(completion) == [PROMPT, "The cat"]
    assert [choice.finish_reason for choice in completion.choices] == ["length", "length"]
    assert completion.usage.completion_tokens == 0
    assert streamed(chat_client, prompt=[PROMPT, "The cat"], echo=True, max_tokens=0) == {0: PROMPT, 1: "The cat"}


def test_prompts_are_cut_where_it_is_wished(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    ids = list(chat_tokenizer.encode(PROMPT))
    for side, kept in (("left", ids[-3:]), ("right", ids[:3])):
        extra = {"truncate_prompt_tokens": 3, "truncation_side": side, "return_token_ids": True}
        completion = create(chat_client, extra, seed=1)
        assert completion.choices[0].prompt_token_ids == kept
        assert texts(completion) == texts(create(chat_client, prompt=kept, seed=1))
    long = create(chat_client, {"truncate_prompt_tokens": -1}, prompt=[5] * 1000)
    assert long.usage.total_tokens == CHAT_CONTEXT
    echoed = create(chat_client, {"truncate_prompt_tokens": 2}, echo=True, max_tokens=0)
    assert texts(echoed) == ["".join(chat_tokenizer.token_bytes(id).decode() for id in ids[-2:])]


def test_special_tokens_in_a_prompt_are_text(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    typed = create(chat_client, {"return_token_ids": True}, prompt="<|im_end|>", max_tokens=1).choices[0]
    assert typed.prompt_token_ids[0] == 0, "the BOS"
    assert not set(typed.prompt_token_ids[1:]) & set(chat_tokenizer.special_ids.values())
    bare = create(chat_client, {"return_token_ids": True, "add_special_tokens": False}, max_tokens=1).choices[0]
    assert bare.prompt_token_ids == list(chat_tokenizer.encode(PROMPT))[1:]


def test_special_tokens_are_shown_on_request(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    start = chat_tokenizer.special_ids["<|im_start|>"]
    only = {"allowed_token_ids": [start]}
    assert texts(create(chat_client, only)) == [""]
    assert texts(create(chat_client, {**only, "skip_special_tokens": False}, max_tokens=2)) == ["<|im_start|>" * 2]
    prompt = [start, start]
    assert texts(create(chat_client, only, prompt=prompt, echo=True)) == [""], "a prompt of nothing but special tokens"


def test_stop_tokens(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    [a] = chat_tokenizer.encode("a", add_special_tokens=False)
    only = {"allowed_token_ids": [a], "stop_token_ids": [a]}
    [choice] = create(chat_client, only).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", a)
    [choice] = create(chat_client, {**only, "include_stop_str_in_output": True, "min_tokens": 0}).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("a", "stop", a)


def test_min_tokens_keep_the_end_away(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    end, [a] = chat_tokenizer.special_ids["<|im_end|>"], chat_tokenizer.encode("a", add_special_tokens=False)
    extra = {"ignore_eos": False, "allowed_token_ids": [a, end], "logit_bias": {str(end): 100}, "min_tokens": 3}
    completion = create(chat_client, extra)
    assert texts(completion) == ["aaa"]
    assert completion.usage.completion_tokens == 4
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].stop_reason is None


def test_min_tokens_keep_stop_strings_away(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    [a] = chat_tokenizer.encode("a", add_special_tokens=False)
    [choice] = create(chat_client, {"allowed_token_ids": [a], "min_tokens": 3}, stop=["a"]).choices
    assert (choice.text, choice.stop_reason) == ("aaa", "a")


def test_a_stop_string_on_request_is_part_of_the_text(chat_client: openai.OpenAI) -> None:
    text = texts(create(chat_client, seed=11, max_tokens=30))[0]
    stop = text[10:13]
    [choice] = create(chat_client, {"include_stop_str_in_output": True}, seed=11, max_tokens=30, stop=stop).choices
    assert choice.text == text[: text.index(stop) + 3]
    assert choice.stop_reason == stop


def test_biases_and_penalties_reach_the_engine(chat_client: openai.OpenAI, chat_tokenizer: Tokenizer) -> None:
    [a] = chat_tokenizer.encode("a", add_special_tokens=False)
    [b] = chat_tokenizer.encode("b", add_special_tokens=False)
    assert texts(create(chat_client, logit_bias={str(a): 100})) == ["aaaaaa"]
    two = {"allowed_token_ids": [a, b]}
    biased = create(chat_client, two, logit_bias={str(a): 8}, temperature=0, max_tokens=12)
    penalized = create(
        chat_client, two, logit_bias={str(a): 8}, temperature=0, max_tokens=12, frequency_penalty=2, presence_penalty=2
    )
    assert texts(penalized)[0].count("b") > texts(biased)[0].count("b")
    for narrowed in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert texts(create(chat_client, narrowed, seed=1)) == texts(create(chat_client, temperature=0)), narrowed


def test_a_temperature_close_to_0_takes_the_likeliest_token(chat_client: openai.OpenAI) -> None:
    assert texts(create(chat_client, temperature=1e-9, seed=1)) == texts(create(chat_client, temperature=0))


def test_a_request_id_need_not_be_unique(chat_server: ServerProcess) -> None:
    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:
            request = {"model": "chatty", "prompt": PROMPT, "seed": 1, "extra_body": {"request_id": "same", **ON}}
            return list(await asyncio.gather(*(client.completions.create(**request, max_tokens=60) for _ in range(4))))

    answers = asyncio.run(together())
    assert {answer.id for answer in answers} == {"cmpl-same"}
    assert len({answer.choices[0].text for answer in answers}) == 1


def test_an_asynchronous_stream(chat_server: ServerProcess) -> None:
    async def collect() -> str:
        async with openai.AsyncOpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(
                model="chatty", prompt=PROMPT, max_tokens=6, seed=2, stream=True, extra_body=ON
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none") as client:
        assert asyncio.run(collect()) == texts(create(client, seed=2))[0]


def test_priority_and_salt_are_taken(chat_client: openai.OpenAI) -> None:
    plain = texts(create(chat_client, seed=1))
    assert (
        texts(create(chat_client, {"priority": -5, "cache_salt": "x", "user": "somebody"}, seed=1, best_of=1)) == plain
    )


@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("max_tokens", 0, {}),
        ("max_tokens", 0, {"echo": True, "n": 2}),
        ("n", 128, {"prompt": [PROMPT, PROMPT]}),
        ("prompt_logprobs", 1, {"stream": True}),
        ("prompt", "", {"add_special_tokens": False}),
        ("prompt", PROMPT, {"truncate_prompt_tokens": 0}),
    ],
)
def test_fields_that_exclude_each_other(
    chat_server: ServerProcess, field: str, value: Any, more: dict[str, Any]
) -> None:
    body = {"prompt": PROMPT, field: value, **more}
    response = httpx.post(f"{chat_server.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in (field, "prompt"), response.text


def test_what_leaves_no_token_is_the_requests_own_fault(chat_server: ServerProcess, chat_tokenizer: Tokenizer) -> None:
    end = chat_tokenizer.special_ids["<|im_end|>"]
    body = {"prompt": PROMPT, "allowed_token_ids": [end], "min_tokens": 2}
    response = httpx.post(f"{chat_server.url}/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsatisfiable"

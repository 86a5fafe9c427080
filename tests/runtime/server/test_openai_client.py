"""What OpenAI's own client sees of a real server process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from checkpoints import SERVED_CONTEXT as CONTEXT
from exposition import samples_of
from served_engine import ENGINE
from server_process import ServerProcess

from quant.scheme import named
from runtime.text.tokenizer import Tokenizer

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_completion(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    completion = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, extra_body={"ignore_eos": True})
    assert completion.object == "text_completion"
    assert completion.model == "tiny"
    [choice] = completion.choices
    assert choice.index == 0
    assert choice.text
    assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 8


def test_max_tokens_is_16_by_default(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


def test_a_stream_has_a_chunk_for_each_token_and_the_same_text(client: openai.OpenAI) -> None:
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 7, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert len(chunks) == 12
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_of_a_stream_comes_last_and_when_asked_for(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=[PROMPT, "The cat"],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 10
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10


def test_a_seed_repeats_and_its_absence_does_not(client: openai.OpenAI) -> None:
    def text(**options: int) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, **options).choices[0].text

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text() != text()
    assert text(seed=-(2**63)) == text(seed=-(2**63))


def test_temperature_zero_is_greedy(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, temperature=0).choices[0].text
        for _ in range(3)
    }
    assert len(texts) == 1


def test_a_list_of_prompts_gives_a_choice_each(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompts = ["Once upon a time", "The cat", "The cat"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, seed=5)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    for index, prompt in enumerate(prompts):
        alone = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, seed=5 + index)
        assert alone.choices[0].text == together.choices[index].text


def test_token_ids_are_a_prompt_as_they_are(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.encode(PROMPT))
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=6, seed=3)
    token_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=6, seed=3)
    lists = client.completions.create(model="tiny", prompt=[ids, ids[1:]], max_tokens=6, seed=3)
    assert token_ids.choices[0].text == text.choices[0].text == lists.choices[0].text
    assert lists.usage is not None
    assert lists.usage.prompt_tokens == 2 * len(ids) - 1


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    request = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 11, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**request).choices[0].text
    stop = text[10:13]
    [choice] = client.completions.create(**request, stop=[stop, "never said"]).choices
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=CONTEXT, stream=True)
    assert long.value.code == "context_length_exceeded"
    assert long.value.param == "max_tokens"


def test_the_models(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card == client.models.retrieve("tiny")
    assert card.model_extra is not None
    engines = ("native", "onnx", "reference") if ENGINE == "auto" else (ENGINE,)
    assert card.model_extra.pop("engine") in engines, "whichever this machine can run"
    assert card.model_extra == {
        "max_model_len": CONTEXT,
        "precision": "w4a4",
        "scheme": named("w4a4").to_dict(),
        "quality": {"perplexity_16bit": 10.0, "perplexity": 10.5},
        "chat": False,
    }
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/other")


def counts(server: ServerProcess) -> dict[str, float]:
    """The server's metrics by name, with the reason behind the name of `osp_request_success_total`."""
    page = samples_of(httpx.get(f"{server.url}/metrics").text)
    samples = [(name, dict(labels), value) for (name, labels), value in page.items()]
    of_models = [sample for sample in samples if "model_name" in sample[1]]
    assert all(labels["model_name"] == "tiny" for _, labels, _ in of_models)
    return {name + labels.get("finished_reason", ""): value for name, labels, value in of_models}


def test_a_client_that_leaves_stops_its_generation(client: openai.OpenAI, server: ServerProcess) -> None:
    before = counts(server)
    request = {"model": "tiny", "prompt": [PROMPT] * 64, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**request, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**request, timeout=0.05)

    def gone() -> bool:
        now = counts(server)
        aborted = now["osp_request_success_totalabort"] - before["osp_request_success_totalabort"]
        return now["osp_num_requests_running"] == now["osp_num_requests_waiting"] == 0 and aborted > 0

    deadline = time.monotonic() + 60
    while not gone():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    after = counts(server)
    assert after["osp_generation_tokens_total"] - before["osp_generation_tokens_total"] < 2 * 64 * 100


def test_metrics_count_what_clients_saw(client: openai.OpenAI, server: ServerProcess) -> None:
    before = counts(server)
    prompt_tokens = completion_tokens = sequences = 0
    for prompt in [PROMPT, [PROMPT, "The cat"], [[1, 2, 3]]]:
        completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, seed=1)
        assert completion.usage is not None
        prompt_tokens += completion.usage.prompt_tokens
        completion_tokens += completion.usage.completion_tokens
        sequences += len(completion.choices)
    after = counts(server)

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("osp_prompt_tokens_total") == prompt_tokens
    assert grown("osp_generation_tokens_total") == completion_tokens
    ended = grown("osp_request_success_totalstop") + grown("osp_request_success_totallength")
    assert ended == sequences == 4
    assert grown("osp_request_success_totalabort") == 0
    assert grown("osp_time_to_first_token_seconds_count") == sequences
    assert grown("osp_e2e_request_latency_seconds_count") == sequences
    assert grown("osp_inter_token_latency_seconds_count") == completion_tokens - sequences
    assert after["osp_num_requests_running"] == after["osp_num_requests_waiting"] == 0
    assert after["osp_kv_cache_usage_perc"] == 0

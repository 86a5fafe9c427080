"""Log-probabilities over HTTP, against a softmax in numpy over the reference engine's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tokenizers
from numpy.typing import NDArray

from quant.format import read_checkpoint
from runtime.engine.reference import ReferenceRunner
from runtime.engine.runner import SequenceSlice
from runtime.text.tokenizer import Tokenizer

PROMPT = "Once upon é 😀 time"


@pytest.fixture(scope="module")
def runner(chat_checkpoint: Path) -> ReferenceRunner:
    return ReferenceRunner(read_checkpoint(chat_checkpoint))


def log_softmax(runner: ReferenceRunner, token_ids: list[int]) -> NDArray[np.float64]:
    """[L, V]; row i is what follows token i."""
    blocks = np.arange(-(-len(token_ids) // runner.block_size), dtype=np.int32)
    whole = SequenceSlice(np.array(token_ids, np.int32), 0, blocks, len(token_ids))
    logits_LV = runner.step([whole]).rows().astype(np.float64)
    logits_LV -= logits_LV.max(1, keepdims=True)
    return logits_LV - np.log(np.exp(logits_LV).sum(1, keepdims=True))


def create(client: openai.OpenAI, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    request = {"model": "chatty", "prompt": PROMPT, "max_tokens": 8, "seed": 4, **options}
    return client.completions.create(
        **request, extra_body={"ignore_eos": True, "return_token_ids": True, **(extra or {})}
    )


@pytest.mark.parametrize("top", [0, 1, 5])
def test_of_the_text(chat_client: openai.OpenAI, runner: ReferenceRunner, top: int) -> None:
    [choice] = create(chat_client, {"return_tokens_as_token_ids": True}, logprobs=top).choices
    expected_LV = log_softmax(runner, choice.prompt_token_ids + choice.token_ids)[len(choice.prompt_token_ids) - 1 :]
    found = choice.logprobs
    assert found.tokens == [f"token_id:{id}" for id in choice.token_ids]
    for place, token in enumerate(choice.token_ids):
        row = expected_LV[place]
        np.testing.assert_allclose(found.token_logprobs[place], row[token], atol=1e-4)
        likeliest = {int(id) for id in np.argsort(-row)[:top]} | {token}
        told = {int(name.removeprefix("token_id:")): value for name, value in found.top_logprobs[place].items()}
        assert set(told) == likeliest
        np.testing.assert_allclose([told[id] for id in told], [row[id] for id in told], atol=1e-4)


def test_of_prompt_and_text_in_one(chat_client: openai.OpenAI, runner: ReferenceRunner, chat_checkpoint: Path) -> None:
    [choice] = create(chat_client, echo=True, logprobs=1).choices
    ids = choice.prompt_token_ids + choice.token_ids
    expected_LV = log_softmax(runner, ids)
    found = choice.logprobs
    assert len(found.tokens) == len(found.text_offset) == len(found.top_logprobs) == len(ids)
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    np.testing.assert_allclose(
        found.token_logprobs[1:], [expected_LV[i, token] for i, token in enumerate(ids[1:])], atol=1e-4
    )
    # The BOS is no text; the library says where the others begin, and where a character does that tokens share.
    library = tokenizers.Tokenizer.from_file(str(chat_checkpoint / "tokenizer.json"))
    library.post_processor = None
    prompt_offsets = [begin for begin, _ in library.encode(PROMPT).offsets]
    assert found.text_offset[: len(choice.prompt_token_ids)] == [0, *prompt_offsets]
    assert found.text_offset[len(choice.prompt_token_ids)] == len(PROMPT)


def test_offsets_point_into_the_text(chat_client: openai.OpenAI) -> None:
    for echo in (False, True):
        [choice] = create(chat_client, echo=echo, logprobs=0, max_tokens=40).choices
        found = choice.logprobs
        begins = zip(found.tokens, found.text_offset, strict=True)
        whole = [(token, offset) for token, offset in begins if not token.startswith(("bytes:", "<|"))]
        assert len(whole) > 10
        # In front of a token may stand what has become of the bytes before, if they were no character.
        assert all(choice.text[offset:].lstrip("\ufffd").startswith(token) for token, offset in whole)


def test_streamed_logprobs_are_the_same(chat_client: openai.OpenAI) -> None:
    for options in ({"echo": True, "n": 2}, {}):
        whole = create(chat_client, logprobs=2, **options)
        joined: dict[int, dict[str, list[Any]]] = {}
        for chunk in create(chat_client, logprobs=2, stream=True, **options):
            [choice] = chunk.choices
            lists = joined.setdefault(choice.index, {})
            for name, values in choice.logprobs.model_dump().items():
                lists.setdefault(name, []).extend(values)
        assert joined == {choice.index: choice.logprobs.model_dump() for choice in whole.choices}


def test_every_choice_echoes_the_prompt(chat_client: openai.OpenAI) -> None:
    choices = create(chat_client, n=3, echo=True, logprobs=1).choices
    lengths = {len(choice.prompt_token_ids) for choice in choices if choice.prompt_token_ids}
    [length] = lengths
    prompts = [choice.logprobs.token_logprobs[:length] for choice in choices]
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0][0] is None


def test_loglikelihood_as_lm_eval_asks_for_it(chat_client: openai.OpenAI, runner: ReferenceRunner) -> None:
    """Its `local-completions` sends token ids and wants the prompt echoed and scored; here with and without a token."""
    ids = [5, 40, 41, 42, 43, 44]
    expected_LV = log_softmax(runner, ids)
    expected = sum(expected_LV[i - 1, ids[i]] for i in range(3, 6))
    greedy = all(expected_LV[i - 1].argmax() == ids[i] for i in range(3, 6))
    for max_tokens, end in ((1, -1), (0, None)):
        answer = create(chat_client, prompt=[ids, ids], echo=True, logprobs=1, temperature=0, max_tokens=max_tokens)
        for choice in answer.choices:
            continuation = slice(3, end)
            np.testing.assert_allclose(sum(choice.logprobs.token_logprobs[continuation]), expected, atol=1e-4)
            tops = choice.logprobs.top_logprobs[continuation]
            tokens = choice.logprobs.tokens[continuation]
            assert greedy == all(t == max(top, key=top.get) for t, top in zip(tokens, tops, strict=True))


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_are_vllm_s(chat_client: openai.OpenAI, runner: ReferenceRunner, count: int) -> None:
    [choice] = create(chat_client, {"prompt_logprobs": count}, max_tokens=1).choices
    expected_LV = log_softmax(runner, choice.prompt_token_ids)
    first, *others = choice.prompt_logprobs
    assert first is None
    for place, (token, entries) in enumerate(zip(choice.prompt_token_ids[1:], others, strict=True)):
        row = expected_LV[place]
        assert next(iter(entries)) == str(token)
        assert set(entries) == {str(int(id)) for id in np.argsort(-row)[:count]} | {str(token)}
        for id, entry in entries.items():
            np.testing.assert_allclose(entry["logprob"], row[int(id)], atol=1e-4)
            assert entry["rank"] == 1 + int((row > row[int(id)]).sum())
    assert others[0][str(choice.prompt_token_ids[1])]["decoded_token"] == "Once"


def test_of_a_chat(chat_client: openai.OpenAI, runner: ReferenceRunner, chat_tokenizer: Tokenizer) -> None:
    answer = chat_client.chat.completions.create(
        model="chatty",
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=12,
        seed=2,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True, "return_token_ids": True, "prompt_logprobs": 1},
    )
    [choice] = answer.choices
    prompt_ids, ids = answer.prompt_token_ids, choice.token_ids
    expected_LV = log_softmax(runner, prompt_ids + ids)[len(prompt_ids) - 1 :]
    content = choice.logprobs.content
    assert len(content) == len(ids) == 12
    for row, token, entry in zip(expected_LV, ids, content, strict=False):
        np.testing.assert_allclose(entry.logprob, row[token], atol=1e-4)
        np.testing.assert_allclose([top.logprob for top in entry.top_logprobs], -np.sort(-row)[:3], atol=1e-4)
        assert bytes(entry.bytes) == chat_tokenizer.token_bytes(token, skip_special_tokens=False)
        assert entry.token.encode() == bytes(entry.bytes) or "\\x" in entry.token
    shown = b"".join(chat_tokenizer.token_bytes(id) for id in ids)
    assert choice.message.content == shown.decode(errors="replace")
    assert len(answer.prompt_logprobs) == len(prompt_ids)

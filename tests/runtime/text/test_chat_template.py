"""Chat templates against transformers, on templates with the features of those that the well-known models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.text.chat_template import ChatTemplate, ChatTemplateError

TEMPLATES = {file.stem: file.read_text() for file in (Path(__file__).parent / "templates").glob("*.jinja")}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city & <more>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": " How are you?\n"}
ANSWER = {"role": "assistant", "content": "Fine, thank you 😀 "}
SYSTEM = {"role": "system", "content": "Be brief."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "turns": [SYSTEM, QUESTION, ANSWER, {"role": "user", "content": 'And "now" <b>\'&?'}],
    "ends with an answer": [QUESTION, ANSWER],
}
TOOL_USE = [
    QUESTION,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "content": "sun"},
]


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


def expected(oracle: PreTrainedTokenizerFast, name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    text = oracle.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **options)
    assert isinstance(text, str)
    return text


def variants() -> list[tuple[str, str]]:
    return [(name, conversation) for name in TEMPLATES for conversation in CONVERSATIONS]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(("name", "conversation"), variants())
def test_conversations(
    oracle: PreTrainedTokenizerFast, name: str, conversation: str, add_generation_prompt: bool
) -> None:
    messages = CONVERSATIONS[conversation]
    found = ChatTemplate(TEMPLATES[name]).render(messages, add_generation_prompt=add_generation_prompt, **NAMED)
    assert found == expected(oracle, name, messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("name", ["chatml", "headers"])
def test_tools(oracle: PreTrainedTokenizerFast, name: str) -> None:
    for messages in (TOOL_USE[:1], TOOL_USE[:2], TOOL_USE):
        found = ChatTemplate(TEMPLATES[name]).render(messages, tools=[TOOL, TOOL], **NAMED)
        assert found == expected(oracle, name, messages, tools=[TOOL, TOOL], add_generation_prompt=True)
        assert "weather" in found


def test_more_variables(oracle: PreTrainedTokenizerFast) -> None:
    found = ChatTemplate(TEMPLATES["turns"]).render([QUESTION], reasoning_effort="low", **NAMED)
    assert found.endswith("<quick>")
    assert found == expected(oracle, "turns", [QUESTION], reasoning_effort="low", add_generation_prompt=True)


@pytest.mark.parametrize("content", ["The answer is", " the answer is  ", "\n"])
@pytest.mark.parametrize("name", ["chatml", "headers", "turns", "brackets"])
def test_the_last_message_is_left_open(oracle: PreTrainedTokenizerFast, name: str, content: str) -> None:
    messages = [QUESTION, {"role": "assistant", "content": content}]
    template = ChatTemplate(TEMPLATES[name])
    found = template.render(messages, continue_final_message=True, add_generation_prompt=False, **NAMED)
    # transformers takes white space at the end for the template's wish, where the template trims.
    assert found.rstrip() == expected(oracle, name, messages, continue_final_message=True).rstrip()
    assert found.endswith(content.lstrip() or content[:0])


def test_which_templates_take_parts() -> None:
    assert {name: ChatTemplate(source).takes_parts for name, source in TEMPLATES.items()} == {
        "chatml": False,
        "headers": False,
        "brackets": False,
        "turns": True,
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_and_text_are_the_same_to_every_template(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name])
    parts = [{"type": "text", "text": "one"}]
    text, listed = (template.render([{"role": "user", "content": content}], **NAMED) for content in ("one", parts))
    assert text == listed
    assert "one" in text


def test_a_template_for_texts_gets_parts_as_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": parts}])
    assert text == "one\ntwo"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ raise_exception('No system prompt, please') }}", "No system prompt, please"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ nosuch.thing }}", "nosuch"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages.__class__.__mro__ }}", "__class__"),
    ],
)
def test_what_goes_wrong_in_a_template_is_told(source: str, named: str) -> None:
    with pytest.raises(ChatTemplateError, match="does not take this conversation") as caught:
        ChatTemplate(source).render([QUESTION])
    assert named in str(caught.value)


@pytest.mark.parametrize("source", ["{% for x in", "{{ x ", "{% nosuch %}"])
def test_a_damaged_template_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="damaged"):
        ChatTemplate(source)


def test_an_open_message_that_the_template_leaves_out_is_refused() -> None:
    for source, message in [("{{ 'hi' }}", QUESTION), ("{{ messages[0].content }}", {"role": "assistant"})]:
        with pytest.raises(ChatTemplateError, match="continue_final_message"):
            ChatTemplate(source).render([message], continue_final_message=True)

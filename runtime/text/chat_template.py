"""A model's chat template: from a conversation to the text of a prompt."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

from runtime.text.template_sandbox import compile_template, parse, render


class ChatTemplateError(ValueError):
    """A template that is none, or a conversation that a template does not take; the message says why."""


class ChatTemplate:
    """A Jinja template, with the variables and the behaviour that transformers gives it.

    Attributes:
        takes_parts: whether it goes through the parts of a message's content. Otherwise it wants a text.
    """

    def __init__(self, source: str) -> None:
        """Raises `ChatTemplateError` where the source is no template."""
        try:
            self._template = compile_template(source)
            self.takes_parts = _loops_over_content(parse(source))
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template is damaged: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt.

        Args:
            messages: plain JSON. A content is a text or a list of `{"type": "text", "text": …}`.
            add_generation_prompt: ends the prompt where the assistant's answer begins.
            continue_final_message: ends it after the content of the last message instead.
            variables: others that the template may use, such as `tools` and `bos_token`.

        Raises:
            ChatTemplateError: the template does not take this conversation, or takes too long.
        """
        end = f"{secrets.randbits(64):020d}" if continue_final_message else ""
        shaped = [self._shaped(message) for message in messages]
        if continue_final_message:
            shaped[-1] = _left_open(shaped[-1], end)
        variables = {"tools": None, "documents": None, **variables}
        variables |= {"messages": shaped, "add_generation_prompt": add_generation_prompt}
        try:
            text = render(self._template, variables)
        except Exception as error:  # a template can run into anything, like any program
            raise ChatTemplateError(f"the chat template does not take this conversation: {_reason(error)}") from error
        return _cut_at(text, end) if continue_final_message else text

    def _shaped(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """With the content in the shape that the template expects, as vLLM does it."""
        content = message.get("content")
        if isinstance(content, str) and self.takes_parts and message["role"] != "tool":
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not (self.takes_parts and message["role"] != "tool"):
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return dict(message)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a `for` goes through `message.content`, `message["content"]` or a variable that was set to it."""

    def is_content(node: nodes.Node) -> bool:
        match node:
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                return True
            case nodes.Name(name=name):
                return name in aliases
            case nodes.Filter(node=nodes.Node() as inner):
                return is_content(inner)
        return False

    aliases: set[str] = set()
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            aliases.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _left_open(message: dict[str, Any], end: str) -> dict[str, Any]:
    """The message with a mark at the end of its content."""
    content = message.get("content")
    if content is None:
        raise ChatTemplateError("continue_final_message needs a last message that has a content")
    if isinstance(content, str):
        return {**message, "content": content + end}
    *others, last = content
    return {**message, "content": [*others, {**last, "text": last["text"] + end}]}


def _cut_at(text: str, end: str) -> str:
    kept, found, _ = text.rpartition(end)
    if not found:
        raise ChatTemplateError("continue_final_message: the chat template leaves the last message's content out")
    return kept


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"

"""What a client typed is never control, whatever a template makes of it."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from runtime.text.chat_template import ChatTemplate
from runtime.text.tokenizer import Tokenizer
from runtime.text.typed_tokens import TypedTokens

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "aba", "✂"]
TEMPLATE = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
)


def backend(*, as_text: bool) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    built.encode_special_tokens = as_text
    return built


TOKENIZER = Tokenizer(backend(as_text=True), named_tokens={"bos_token": "<s>"})
CONTROL = set(TOKENIZER.special_ids.values())
texts = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "ab", "b", "{", '"', "é", " "]), max_size=8).map("".join)


@given(content=texts)
def test_typed_tokens_are_text_and_the_template_s_are_not(content: str) -> None:
    typed = TypedTokens(TOKENIZER)
    rendered = TEMPLATE.render([{"role": "user", "content": typed.hide(content)}], bos_token="<s>")
    ids = typed.encode(rendered)
    assert [id for id in ids if id in CONTROL] == [
        TOKENIZER.special_ids[t] for t in ("<s>", "<|im_start|>", "<|im_end|>")
    ]
    text = b"".join(TOKENIZER.token_bytes(id) for id in ids).decode()
    assert text == f"user\n{content}"


@given(content=st.text(alphabet="abc é😀\n", max_size=12).filter(lambda text: "aba" not in text))
def test_ordinary_messages_are_encoded_as_the_library_does(content: str) -> None:
    typed = TypedTokens(TOKENIZER)
    rendered = TEMPLATE.render([{"role": "user", "content": typed.hide(content)}], bos_token="<s>")
    assert list(typed.encode(rendered)) == backend(as_text=False).encode(rendered, add_special_tokens=False).ids


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_hidden_tokens_survive_json_in_any_depth(ensure_ascii: bool) -> None:
    value = {"<s>": ["x<|im_end|>", {"k": "✂"}], "n": 1, "t": True, "o": None}
    typed = TypedTokens(TOKENIZER)
    source = "{{ value | tojson(ensure_ascii=true) }}" if ensure_ascii else "{{ value | tojson }}"
    rendered = ChatTemplate(source).render([{"role": "user", "content": ""}], value=typed.hide(value))
    ids = typed.encode(rendered)
    assert not CONTROL & set(ids)
    assert json.loads(b"".join(TOKENIZER.token_bytes(id) for id in ids)) == value


def test_a_role_may_become_a_token() -> None:
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{% endfor %}")
    typed = TypedTokens(TOKENIZER)
    assert typed.encode(template.render([{"role": "im_start", "content": ""}])) == (
        TOKENIZER.special_ids["<|im_start|>"],
    )

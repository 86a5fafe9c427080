"""A tiny chat model: random weights, ChatML's special tokens and a template."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import END, write_byte_level_tokenizer
from served_engine import write_model
from tokenizers import AddedToken, Tokenizer

CHAT_CONTEXT = 256
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('developers do not speak here') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments.city }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ mood or '' }}{% endif %}"
)

TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": "<|im_end|>"}


def write_chat(root: Path) -> Path:
    """Writes it, in the form that the engine runs; a vocabulary of 320, a context of `CHAT_CONTEXT`."""
    shape = {"vocab_size": 320, "max_position_embeddings": CHAT_CONTEXT, "num_hidden_layers": 1}
    write_model(root, _write_tokenizer, "<|im_end|>", **shape)
    end = Tokenizer.from_file(str(root / "tokenizer.json")).token_to_id("<|im_end|>")
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    (root / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return root


def _write_tokenizer(root: Path, vocab_size: int) -> None:
    write_byte_level_tokenizer(root, vocab_size)
    file = str(root / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(file)

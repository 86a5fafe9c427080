"""What a checkpoint's configuration says of its tokens: those that end a text, and those that templates name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from runtime.text.token_bytes import TokenizerError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def end_token_ids(directory: Path, backend: tokenizers.Tokenizer) -> frozenset[int]:
    """The tokens that end a text: from generation_config.json, else config.json, else tokenizer_config.json.

    Raises:
        TokenizerError: a file that names them is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        if ids is not None:
            return _checked_ids(ids, directory / name)
    token = named_tokens(directory).get("eos_token")
    id = None if token is None else backend.token_to_id(token)
    return frozenset() if id is None else frozenset({id})


def named_tokens(directory: Path) -> dict[str, str]:
    """The texts of the special tokens that have a part to play, by transformers' names: `bos_token` and so on.

    Raises:
        TokenizerError: a file that names them is damaged.
    """
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter counts where both name one
        content = _read_json(directory / name)
        for part in _NAMED:
            token = content.get(part)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[part] = token
    return tokens


def _checked_ids(ids: object, file: Path) -> frozenset[int]:
    listed = ids if isinstance(ids, list) else [ids]
    if not all(type(id) is int and id >= 0 for id in listed):
        raise TokenizerError(f"{file}: eos_token_id must be a token id or a list of them, is {ids!r}")
    return frozenset(listed)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content

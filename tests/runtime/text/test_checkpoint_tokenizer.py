from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, processors

from quant.llama import CheckpointError
from runtime.text.tokenizer import Tokenizer, TokenizerError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    backend = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<": 4, "s": 5, ">": 6}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(file: Path, **content: object) -> None:
    file.write_text(json.dumps(content))


def test_bos_stands_where_the_post_processor_puts_it(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("ab") == (0, 2, 3)
    assert tokenizer.encode("") == (0,)


def test_a_special_token_in_a_prompt_is_text(directory: Path) -> None:
    assert Tokenizer.load(directory).encode("<s>") == (0, 4, 5, 6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_whole_whatever_the_file_says_of_truncation_and_padding(directory: Path, side: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4, direction=side)
    backend.enable_padding(length=8, direction=side)
    assert backend.encode("ab").ids != [0, 2, 3]
    assert backend.encode("abab" * 9).ids != [0, *[2, 3] * 18]
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("ab") == (0, 2, 3)
    assert tokenizer.encode("abab" * 9) == (0, *[2, 3] * 18)


def test_half_a_surrogate_pair_is_refused(directory: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        Tokenizer.load(directory).encode("\ud83d")


def test_end_tokens_come_from_the_first_file_that_names_them(directory: Path) -> None:
    assert Tokenizer.load(directory).end_token_ids == frozenset()
    write(directory / "tokenizer_config.json", eos_token={"content": "</s>"})
    assert Tokenizer.load(directory).end_token_ids == {1}
    write(directory / "config.json", eos_token_id=2)
    assert Tokenizer.load(directory).end_token_ids == {2}
    write(directory / "generation_config.json", eos_token_id=[3, 1])
    assert Tokenizer.load(directory).end_token_ids == {1, 3}


def test_a_bad_end_token_is_named(directory: Path) -> None:
    write(directory / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(TokenizerError, match=r"generation_config\.json.*'</s>'"):
        Tokenizer.load(directory)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json"])
def test_a_damaged_file_is_named(directory: Path, content: str) -> None:
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(directory)


def test_an_unknown_family_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(backend)

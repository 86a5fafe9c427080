"""A small corpus of real English: the topics of Python's own help."""

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

LICENCE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one .jsonl file and one .txt file, some 80 documents in all."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [text for _, text in sorted(topics.items())]
    (folder / "topics.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]), "utf-8")
    (folder / "single.txt").write_text(texts[0], "utf-8")
    return folder


@pytest.fixture(scope="session")
def licence_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that is the same on every machine: the 33 paragraphs of the repository's licence, as .jsonl."""
    paragraphs = [text for text in re.split(r"\n\s*\n", LICENCE.read_text("utf-8")) if text.strip()]
    file = tmp_path_factory.mktemp("licence") / "licence.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs), "utf-8")
    return file

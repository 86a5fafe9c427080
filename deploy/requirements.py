"""Prints what pyproject.toml, here or in the parent directory, asks for: python requirements.py [EXTRA...] [--only]

For images, which install dependencies in a layer of their own, before the code. `--only` leaves the base's out.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str], base: bool = True) -> list[str]:
    """The requirements of a project and of its extras.

    Raises:
        KeyError: the project has no extra by that name.
    """
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    chosen = [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]
    return [*(project["dependencies"] if base else []), *chosen]


if __name__ == "__main__":
    here = Path(__file__).parent
    pyproject = next(p for p in (here / "pyproject.toml", here.parent / "pyproject.toml") if p.exists())
    extras = [argument for argument in sys.argv[1:] if argument != "--only"]
    print("\n".join(requirements(pyproject, extras, base="--only" not in sys.argv)))  # noqa: T201

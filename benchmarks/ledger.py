"""What was measured, kept on disk, so that a long run that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import quant


class Ledger:
    """A file of JSON lines: the key of a measurement, what it is of, the code that it was made by, and the result.

    Attributes:
        outdated: what was found, and had been measured by other sources of `quant`.
    """

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` where a line is not one of a ledger; the message names it."""
        self.path = path
        self.outdated: list[str] = []
        self._code = _code_sha256()
        self._entries: dict[str, dict[str, Any]] = {}
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self._entries[entry["key"]] = {name: entry[name] for name in ("of", "code", "result")}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{number}: not a measurement ({error!r}); remove the line") from None

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def find(self, key: str) -> dict[str, Any]:
        """The result that is kept under `key`; KeyError where there is none."""
        entry = self._entries[key]
        if entry["code"] != self._code and entry["of"] not in self.outdated:
            self.outdated.append(entry["of"])
        return dict(entry["result"])

    def keep(self, key: str, of: str, result: Mapping[str, Any]) -> None:
        """Keeps a result, on disk too."""
        entry = {"of": of, "code": self._code, "result": dict(result)}
        self._entries[key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **entry}) + "\n")


def sha256_of(content: Mapping[str, Any]) -> str:
    """A key for what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _code_sha256() -> str:
    """Of the sources of `quant`, which decide what a measurement comes to."""
    digest = hashlib.sha256()
    for file in sorted(Path(quant.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

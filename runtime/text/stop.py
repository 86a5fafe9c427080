"""Stop strings: the text before them goes out, they and what follows do not, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one growing text for stop strings.

    The first stop string to be complete wins, and the longest of those that are complete at the same character. So
    generation ends as soon as it can, and the outcome does not depend on how the text arrives.

    Attributes:
        matched: the stop string that was found, or None. Once set, no more text comes out.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """Takes non-empty strings.

        Args:
            include: the text that goes out ends with the stop string rather than before it.
        """
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may go out. Held back is only what may yet become a stop string: a proper prefix of one."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[:end] if self._include else text[: end - len(self.matched)]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back; to be called at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

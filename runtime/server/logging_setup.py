"""How the process logs: lines of text or JSON objects, on stderr.

Messages never hold prompts or keys. The one line of each request (`runtime.server.access_log`) carries its facts as
fields; with `--log-prompts`, and only then, the request's body is one of them.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from runtime.server.settings import ServerSettings

FIELDS = "fields"
"""The attribute of a log record under which further facts lie, by name: `log.info(…, extra={FIELDS: {…}})`."""


def configure_logging(settings: ServerSettings) -> None:
    """Sets up the root logger of this process."""
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter()
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    # Libraries have nothing to say below a warning that an operator would want.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("runtime").setLevel(settings.log_level.upper())


class TextFormatter(logging.Formatter):
    """`LEVEL logger: message name=value …`; a value with spaces is quoted as in JSON."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The line, without a traceback."""
        fields: dict[str, Any] = getattr(record, FIELDS, {})
        return " ".join([super().formatMessage(record), *(f"{name}={_word(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC, RFC 3339), level, logger, message, the fields, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _word(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isprintable() and not set(text) & set(' "=') and text else json.dumps(text)

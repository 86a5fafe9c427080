"""One line in the log for each request."""

from __future__ import annotations

import logging

from runtime.server.logging_setup import FIELDS
from runtime.server.request_record import RequestRecord

log = logging.getLogger(__name__)

_PROBES = ("/health", "/ready", "/metrics")
_MAX_PATH = 200
_MAX_BODY = 20_000


def log_request(record: RequestRecord) -> None:
    """Says what was asked and what came of it: never the query, never a key, and a body only if it was kept.

    Probes, which come every few seconds, are for the debug level.
    """
    quiet = record.path in _PROBES and (record.status or 0) < 400
    level = logging.DEBUG if quiet else logging.INFO
    if not log.isEnabledFor(level):
        return
    fields = {
        "request_id": record.id,
        "client": record.client,
        "status": record.status,
        "duration_ms": round(record.elapsed_s * 1000, 1),
        "key": record.key_name,
        "model": record.model,
        "error": record.error,
        "finish": ",".join(record.finish_reasons) or None,
    }
    if record.model is not None:
        fields |= {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "first_token_ms": None if record.first_token_s is None else round(record.first_token_s * 1000, 1),
        }
    if record.body is not None:
        fields["body"] = record.body[:_MAX_BODY].decode(errors="replace")
    known = {name: value for name, value in fields.items() if value is not None}
    log.log(level, "%s %s", record.method, record.path[:_MAX_PATH], extra={FIELDS: known})

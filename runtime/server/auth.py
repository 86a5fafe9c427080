"""API keys: who may call the server.

Once there is a key, every route asks for one, those that do not exist too; only `PROBES` do not, and what the settings
open by name.
A client sends it as OpenAI's clients do, `Authorization: Bearer KEY`, or, so that people can open the pages in a
browser, as the password of HTTP's basic authentication, under any user name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.errors import ApiError, send_error
from runtime.server.request_record import request_record

PROBES = frozenset({"/health", "/ready"})
"""For load balancers and supervisors, which have no key."""

_NAMED_KEY = re.compile(r"(?:(?P<name>[\w.-]{1,64}):)?(?P<key>[!-~]+)", re.ASCII)


class ApiKeyError(ValueError):
    """Keys that cannot be used; the message says where they stand, and no key."""


class ApiKeys:
    """The keys that are let in, by name. Only their hashes are kept."""

    def __init__(self, texts: Iterable[str] = (), file: Path | None = None) -> None:
        """Takes keys of the form KEY or NAME:KEY, and more of them from a file, one a line (# begins a comment).

        Raises:
            ApiKeyError: one is malformed, two have a name in common, or the file cannot be read or has none.
        """
        self._texts = tuple(texts)
        self._file = file
        self._names: dict[bytes, str] = {}
        self.reload()

    def __bool__(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._names)

    def reload(self) -> None:
        """Reads the file anew. If that raises `ApiKeyError`, the keys are as before."""
        names: dict[bytes, str] = {}
        for where, text in (*((f"API key {i}", text) for i, text in enumerate(self._texts, 1)), *self._lines()):
            match = _NAMED_KEY.fullmatch(text)
            if match is None:
                raise ApiKeyError(f"{where} must be KEY or NAME:KEY, in ASCII and without spaces")
            digest = _digest(match["key"])
            name = match["name"] or f"key-{digest.hex()[:8]}"
            if name in names.values() or digest in names:
                raise ApiKeyError(f"{where} is there already, or its name {name!r} is; each must be another one")
            names[digest] = name
        self._names = names

    def name_of(self, key: str) -> str | None:
        """The name of a key; None if it is not one. Takes the same time whichever keys it resembles."""
        digest, found = _digest(key), None
        for known, name in self._names.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _lines(self) -> list[tuple[str, str]]:
        if self._file is None:
            return []
        try:
            lines = self._file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
            raise ApiKeyError(f"the API keys of {self._file} cannot be read: {reason}") from None
        keys = [(f"line {i} of {self._file}", line.strip()) for i, line in enumerate(lines, 1)]
        keys = [(where, line) for where, line in keys if line and not line.startswith("#")]
        if not keys:
            # An emptied file must not open the server to everybody.
            raise ApiKeyError(f"{self._file} has no API key in it")
        return keys


class Authentication:
    """ASGI middleware: answers 401 to whoever has no key, and notes the key's name in the request's record."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: frozenset[str] = PROBES) -> None:
        """`open_paths`: those that ask for no key, each a whole path."""
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through or refuses it."""
        if scope["type"] != "http" or not self._keys or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = _presented(headers.get("authorization", ""))
        name = self._keys.name_of(key) if key else None
        if name is None:
            await send_error(_refusal(key is not None, headers), scope, receive, send)
            return
        request_record().key_name = name
        await self._app(scope, receive, send)


def _presented(authorization: str) -> str | None:
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip() or None
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _refusal(has_key: bool, headers: Headers) -> ApiError:
    # Only where a person would see it does a browser ask for a password.
    scheme = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
    needed = {"Bearer": "Authorization: Bearer KEY", "Basic": "give it as the password, under any user name"}[scheme]
    message = "this API key is not known here" if has_key else f"an API key is needed: {needed}"
    challenge = {"WWW-Authenticate": f'{scheme} realm="osp-runtime"'}
    return ApiError(401, message, code="invalid_api_key", headers=challenge)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

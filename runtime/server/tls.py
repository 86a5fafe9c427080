"""The server's certificate, which can be exchanged while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path


class TlsError(ValueError):
    """A certificate that cannot be used; the message names the files and the fault."""


class Certificate:
    """A certificate with its key.

    Attributes:
        context: what the web server listens with. It hands each new connection to the certificate as read last, so
            that a renewed one is there from one connection to the next, and a broken one never.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Reads both PEM files; raises `TlsError`."""
        self.files = (certificate, key)
        self._current = self._read()
        self.context = self._read()
        self.context.sni_callback = self._hand_over  # called for clients that name no server, too

    def reload(self) -> None:
        """Reads the files anew. If that raises `TlsError`, the certificate is as before."""
        self._current = self._read()

    def _hand_over(self, connection: ssl.SSLObject | ssl.SSLSocket, *_: object) -> None:
        connection.context = self._current

    def _read(self) -> ssl.SSLContext:
        certificate, key = self.files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # A password, so that nobody is asked for one: a server has no terminal.
            context.load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).lower().replace("_", " ")
            raise TlsError(f"the certificate {certificate} with the key {key} cannot be used: {reason}") from None
        except OSError as error:
            raise TlsError(f"the certificate {certificate} or the key {key} cannot be read: {error.strerror}") from None
        return context

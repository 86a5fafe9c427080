"""HTTPS with certificates that OpenSSL makes, and their renewal while the server runs."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess, running_server

from runtime.server.tls import Certificate, TlsError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            *("-out", str(cert), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("pairs")
    return {name: make_pair(folder, name) for name in ("first", "second", "third")}


Install = Callable[[str], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("installed")


@pytest.fixture(scope="module")
def install(folder: Path, pairs: dict[str, tuple[Path, Path]]) -> Install:
    """Puts a pair in the place from which the server reads it."""

    def put(name: str) -> None:
        for source, target in zip(pairs[name], ("cert.pem", "key.pem"), strict=True):
            shutil.copy(source, folder / "new")
            (folder / "new").replace(folder / target)

    return put


@pytest.fixture(scope="module")
def https(checkpoint: Path, folder: Path, install: Install) -> Iterator[ServerProcess]:
    install("first")
    files = ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"))
    with running_server(str(checkpoint), *files) as server:
        yield server
        assert server.stop() == 0


def shows(server: ServerProcess, cert: Path) -> bool:
    """Whether new connections get this certificate."""
    port = int(server.url.rpartition(":")[2])
    return ssl.get_server_certificate(("127.0.0.1", port)) == cert.read_text()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_certificate_is_renewed_without_a_restart(
    https: ServerProcess, pairs: dict[str, tuple[Path, Path]], install: Install, folder: Path
) -> None:
    assert https.url.startswith("https://")
    first, second, third = (
        ssl.create_default_context(cafile=str(pairs[name][0])) for name in ("first", "second", "third")
    )
    body = {"prompt": "The cat", "max_tokens": 2}
    with httpx.Client(base_url=https.url, verify=first, timeout=30) as old:
        assert old.post("/v1/completions", json=body).status_code == 200
        install("second")
        https.process.send_signal(signal.SIGHUP)
        eventually(lambda: shows(https, pairs["second"][0]))
        assert httpx.get(f"{https.url}/health", verify=second).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{https.url}/health", verify=first)
        assert old.post("/v1/completions", json=body).status_code == 200  # an open connection goes on

    shutil.copy(pairs["third"][0], folder / "cert.pem")  # with the key of the second
    https.log.wait_for("certificate as before: .*key values mismatch")
    assert shows(https, pairs["second"][0])
    install("third")  # without a signal
    eventually(lambda: shows(https, pairs["third"][0]))
    assert httpx.get(f"{https.url}/health", verify=third).status_code == 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the old TLS
def test_plain_http_and_old_tls_are_refused(https: ServerProcess) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(https.url.replace("https", "http"))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{https.url}/health", verify=old)


def test_pairs_that_cannot_be_used(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    cert, key = pairs["first"]
    empty = tmp_path / "empty"
    empty.touch()
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-in", str(key), "-aes128", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    for bad_cert, bad_key in (
        (cert, pairs["second"][1]),
        (tmp_path / "none", key),
        (cert, empty),
        (empty, key),
        (cert, locked),
    ):
        with pytest.raises(TlsError) as caught:
            Certificate(bad_cert, bad_key)
        assert str(bad_cert) in str(caught.value)
        assert str(bad_key) in str(caught.value)

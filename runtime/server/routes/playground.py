"""`GET /`: the playground, a page for people, and its files. No build step, and nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from runtime.server.errors import ApiError, shortened

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).parents[1] / "playground"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
_PAGE = "index.html"
_PARTS = _FILES.keys() - {_PAGE}

PATHS = frozenset({"/"} | {f"/playground/{name}" for name in _PARTS})
"""All that a browser fetches to show the page. None of it tells anything of the server or its models."""

_HEADERS = {
    # Text of a model is never markup: the page could not make any of it, even by mistake.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    # After an update the old page would speak to the new server.
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return _file(_PAGE)


@router.get("/playground/{name}")
async def file(name: str) -> Response:
    """A style sheet, a script or a picture of the page."""
    if name not in _PARTS:
        raise ApiError(404, f"the playground has no file {shortened(name)!r}")
    return _file(name)


def _file(name: str) -> Response:
    return Response(_FILES[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)

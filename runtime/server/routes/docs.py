"""`GET /docs`: the API on one page, written from the OpenAPI description, with nothing from elsewhere and no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

router = APIRouter()

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font: 600 1.1rem ui-monospace, monospace; margin-top: 2.5rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884 }
td:first-child { font-family: ui-monospace, monospace }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Every route with the fields that it takes."""
    description = request.app.openapi()
    return HTMLResponse("\n".join(_page(description)), headers={"Content-Security-Policy": _POLICY})


def _page(description: Mapping[str, Any]) -> Iterator[str]:
    title = escape(f"{description['info']['title']} {description['info']['version']}")
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
    yield f'<body><h1>{title}</h1><p>Also for programs: <a href="/openapi.json">openapi.json</a>.</p>'
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            yield f"<h2>{escape(method.upper())} {escape(path)}</h2>"
            yield f"<p>{escape(operation.get('description', ''))}</p>"
            yield from _fields(operation, description)
    yield "</body></html>"


def _fields(operation: Mapping[str, Any], description: Mapping[str, Any]) -> Iterator[str]:
    """A table of the fields of a JSON body."""
    content = operation.get("requestBody", {}).get("content", {})
    schema = _resolved(content.get("application/json", {}).get("schema", {}), description)
    if not schema.get("properties"):
        return
    required = schema.get("required", ())
    yield "<table><thead><tr><th>field<th>type<th>default<th></thead><tbody>"
    for name, field in schema["properties"].items():
        default = "required" if name in required else field.get("default", "")
        cells = (name, _type(field, description), default, field.get("description", ""))
        yield "<tr>" + "".join(f"<td>{escape(str(cell))}" for cell in cells)
    yield "</tbody></table>"


def _resolved(schema: Mapping[str, Any], description: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema that stands elsewhere, by the name that refers to it."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return description["components"]["schemas"][name] if name else schema


def _type(schema: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        names = dict.fromkeys(_type(choice, description) for choice in choices)
        return " or ".join(name for name in names if name != "null")
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), description)}"
    return str(schema.get("type", "any"))

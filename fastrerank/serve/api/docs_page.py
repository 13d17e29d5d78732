"""The page that shows the OpenAPI document. Its files come from this server, none from another host."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response

__all__ = ["add_docs_page"]

# Files of Swagger UI 5, the first version that reads OpenAPI 3.1: name -> media type.
_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def add_docs_page(app: FastAPI) -> None:
    """Add `/docs` and its files to an application that was made with `docs_url=None`.

    fastapi-offline brings the files; where it is not installed, `/docs` is a line that says so.

    Example:
        >>> app = FastAPI(docs_url=None, redoc_url=None)                                 # doctest: +SKIP
        >>> add_docs_page(app)                                                           # doctest: +SKIP
    """
    found = find_spec("fastapi_offline")
    folder = Path(found.origin).parent / "static" if found is not None and found.origin is not None else None
    # Relative addresses also work behind a proxy that serves the application under a prefix.
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title}: HTTP interface",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    html = bytes(page.body).decode()
    policy = {"content-security-policy": _policy(html)}

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        if folder is None:
            message = "This page needs fastapi-offline: pip install 'fastrerank[serve]'. /openapi.json works without."
            return Response(message, 501, media_type="text/plain; charset=utf-8")
        return HTMLResponse(html, headers=policy)

    def add(name: str, media_type: str, path: Path) -> None:
        @app.get(f"/docs/{name}", include_in_schema=False)
        async def file() -> Response:
            return FileResponse(path, media_type=media_type)

    if folder is not None:
        for name, media_type in _FILES.items():
            add(name, media_type, folder / name)


def _policy(html: str) -> str:
    """What a browser may do with the page: run its own line and this server's files, and ask this server."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in _INLINE.findall(html)]
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

"""The chat page at `/`, and what a browser lets it do. Knows one file; it talks to the API as others do."""

import base64
import hashlib
import importlib.resources
import re

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_ELEMENT = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_router() -> APIRouter:
    """The route of the page, for a server that has one."""
    html = importlib.resources.files("gptoss_jax.server").joinpath("static/index.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy(html), "Cache-Control": "no-cache"}
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return router


def policy(html: str) -> str:
    """Only the page's own script and style run, and they reach this server alone: no text of a model becomes code."""
    rules = {
        "default-src": "'none'",
        "script-src": _hashes("script", html),
        "style-src": _hashes("style", html),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hashes(tag: str, html: str) -> str:
    contents = [content for name, content in _ELEMENT.findall(html) if name == tag]
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

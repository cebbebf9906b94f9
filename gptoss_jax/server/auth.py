"""Who may ask: keys, names of this host, origins of pages. Knows headers; knows no route's work.

Without keys a server trusts whoever reaches it. A browser is a way to reach it for every page that its user opens, so
a page may ask only when it comes from this server or from an allowed origin; a name that a page's owner made point
here ("DNS rebinding") is no name of this server.
"""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gptoss_jax.server.errors import ApiError
from gptoss_jax.server.settings import ServerSettings

# They tell nothing of anybody's requests: the page, the documentation, and whether there is a server.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/favicon.ico"})


class Guard:
    """Lets a request pass, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings):
        self._app = app
        self._keys = [key.encode() for key in settings.api_keys]
        self._hosts = frozenset(settings.trusted_hosts)
        self._origins = settings.cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            message = f"the Host header is {host[:100]!r}; expected one of {', '.join(sorted(self._hosts))}"
            return ApiError(403, message, code="host_not_allowed")
        if self._keys:
            return None if scope["path"] in OPEN_PATHS else self._without_key(headers)
        origin = headers.get("origin")
        if origin is None or scope["method"] in ("GET", "HEAD", "OPTIONS") or self._may_ask(origin, host):
            return None
        message = f"a page of {origin[:100]!r} asks; only this server's own page may: allow the origin, or set a key"
        return ApiError(403, message, code="origin_not_allowed")

    def _without_key(self, headers: Headers) -> ApiError | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        # All are compared, each in the same time wherever it differs: how long an answer takes tells nothing of a key.
        if sum(hmac.compare_digest(given, expected) for expected in self._keys):
            return None
        message = "no valid API key: send the header 'Authorization: Bearer KEY' with a key of this server"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _may_ask(self, origin: str, host: str) -> bool:
        return urlsplit(origin).netloc == host or "*" in self._origins or origin in self._origins


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]

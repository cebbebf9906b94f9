"""How long a body may be. Knows bytes; knows no route."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.server.errors import ApiError


class BodyLimit:
    """Refuses a body that is too long: by its Content-Length, or else while it is read, before all of it is here."""

    def __init__(self, app: ASGIApp, *, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            await self._too_long().response()(scope, receive, send)
            return
        num_read = 0

        async def limited() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_bytes:
                raise self._too_long()
            return message

        await self._app(scope, limited, send)

    def _too_long(self) -> ApiError:
        message = f"the body has more than {self._max_bytes} bytes, which is the most that this server takes"
        # What is left of the body would be read as the next request.
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})

"""Every way a request can fail, in OpenAI's envelope. Knows status codes; knows no route.

    {"error": {"message": "…", "type": "invalid_request_error", "param": "messages.0.content", "code": null}}

400 what is asked for cannot be had · 401 no key · 403 another site's page · 404, 405 no such thing · 413 too long ·
422 not the form it must have · 429 the queue is full · 500 our mistake · 503 the model loads, or the server ends
"""

import http
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gptoss_jax.engine.scheduler import QueueFull
from gptoss_jax.errors import UserError

_logger = logging.getLogger(__name__)

_MOST_FAULTS = 5  # of a body that are listed
_INTERNAL = "the server made a mistake; its log says more"


class ApiError(HTTPException):
    """A failure as the client is told of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers) if headers else None)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type

    @property
    def body(self) -> dict[str, Any]:
        """The envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer to a request that failed so."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def unsupported(param: str, message: str) -> ApiError:
    """A parameter of OpenAI's that is known and cannot be had here: it is refused, never ignored."""
    return ApiError(400, f"{param}: {message}", code="unsupported_parameter", param=param)


def unavailable(message: str, *, code: str, retry_after_s: int = 1) -> ApiError:
    """It may work later."""
    return ApiError(503, message, code=code, type="server_error", headers={"Retry-After": str(retry_after_s)})


def of_end(reason: str, message: str) -> ApiError:
    """Of an answer that ended by neither "stop" nor "length", nor by a call."""
    if reason == "refused":
        return ApiError(400, message or "the engine refused the request", code="refused")
    if reason == "abort":
        return unavailable("the answer was ended, since the server is shutting down", code="shutting_down")
    _logger.error("an answer ended by an error: %s", message)
    return ApiError(500, _INTERNAL, code="internal_error", type="server_error")


def as_api_error(error: Exception, *, retry_after_s: int = 1) -> ApiError:
    """What a client is told of any exception; of our own mistakes nothing but that there was one."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            headers = {"Retry-After": str(retry_after_s)}
            return ApiError(429, str(error), code="queue_full", type="rate_limit_error", headers=headers)
        case UserError():
            return ApiError(400, str(error))
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            phrase = http.HTTPStatus(error.status_code).phrase
            code = phrase.lower().replace(" ", "_")
            return ApiError(error.status_code, str(error.detail or phrase), code=code, headers=error.headers)
        case _:
            return ApiError(500, _INTERNAL, code="internal_error", type="server_error")


def install(app: FastAPI) -> None:
    """Makes every error of the application's look like OpenAI's."""
    for kind in (UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):
        error = _of_routing(request, error)
    return as_api_error(error, retry_after_s=request.app.state.service.settings.retry_after_s).response()


def _of_routing(request: Request, error: HTTPException) -> HTTPException:
    """Says which path there is not, or which method."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"there is no {where}; /docs lists what there is", code="not_found")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{where}: expected {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return error


def _of_validation(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    if faults and faults[0]["type"] == "json_invalid":
        place, reason = faults[0]["loc"][-1], faults[0].get("ctx", {}).get("error", "no JSON")
        return ApiError(400, f"the body is no JSON: {reason} at character {place}", code="invalid_json")
    if faults and tuple(faults[0]["loc"]) == ("body",):
        message = "the body: expected a JSON object, with the header Content-Type: application/json"
        return ApiError(422, message, code="invalid_body")
    told = [f"{_path(fault['loc'])}: {fault['msg']}" for fault in faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        told.append(f"and {len(faults) - _MOST_FAULTS} more")
    return ApiError(422, "; ".join(told), code="invalid_value", param=_path(faults[0]["loc"]) if faults else None)


def _path(place: Sequence[str | int]) -> str:
    """`("body", "messages", 0, "content")` as messages.0.content; words in which pydantic names a variant stay out."""
    parts = [str(part) for part in place if part != "body"]
    return ".".join(part for part in parts if json.dumps(part) == f'"{part}"' and "[" not in part) or "body"

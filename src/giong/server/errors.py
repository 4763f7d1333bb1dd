"""OpenAI's error envelope, for everything that goes wrong: the client's exceptions are built from its fields.

A 5xx that would only happen again says `x-should-retry: false`; the official clients otherwise ask twice more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from giong import errors
from giong.server import rendering
from giong.server.words import WORDS

REQUEST_ID = "giong.request_id"
"""Key of the request's id in the ASGI scope."""
HTTP_STATUS = {
    "model_not_found": 404, "invalid_request": 400, "context_length_exceeded": 400, "model_failed": 500, "shutting_down": 503,
}  # fmt: skip


class ApiError(errors.ServingError):
    """A request is refused with an HTTP status; `param` names the field at fault, `code` is for programs."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.status, self.param, self.code = status, param, code


def from_protocol(record: Mapping[str, Any], code: str) -> ApiError:
    """The model process's error as an HTTP one. Its place, a path of this machine, stays here."""
    error = errors.from_dict(dict(record))
    param = {"model_not_found": "model", "context_length_exceeded": "messages"}.get(code)
    shown = None if code == "invalid_request" else code
    return ApiError(error.message, HTTP_STATUS.get(code, 500), param=param, code=shown, remedy=error.remedy)


def envelope(error: errors.GiongError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) for an error."""
    status, param, code = 500, None, None
    if isinstance(error, ApiError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, errors.ServingError):
        status, code = 503, "model_process_gone"
    elif isinstance(error, errors.ConfigError | errors.DataError):
        status = 400
    elif isinstance(error, errors.StoryError):
        status = 409
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = f"{error.message.rstrip('.')}. {error.remedy}".strip()
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: errors.GiongError, request: Request, headers: Mapping[str, str] | None = None) -> JSONResponse:
    status, body = envelope(error)
    headers = dict(headers or {})
    if status >= 500:
        headers["x-should-retry"] = "false"
    if REQUEST_ID in request.scope:
        headers["x-request-id"] = request.scope[REQUEST_ID]
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Let every failure of `app` answer with the envelope, the framework's own included."""

    @app.exception_handler(errors.GiongError)
    async def known(request: Request, error: errors.GiongError) -> Response:
        if "text/html" in request.headers.get("accept", "") and getattr(app.state, "project", None):
            status, body = envelope(error)
            return rendering.page(request, "failure", WORDS, status=status, message=body["error"]["message"])
        return error_response(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(explain(error.errors()), request)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        line = f"{request.method} {request.url.path}"
        known = {404: f"There is no {line} here", 405: f"{line} is not allowed: the path takes another method"}
        remedy = "The API is at /v1/chat/completions, /v1/embeddings, /v1/classify and /v1/models." if error.status_code in known else ""
        message = known.get(error.status_code, str(error.detail))
        return error_response(ApiError(message, error.status_code, remedy=remedy), request, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # The framework raises it again for the server's log; the client learns no more than its class.
        message = f"The server failed on this request ({type(error).__name__})"
        return error_response(ApiError(message, 500, remedy="See its terminal for the reason."), request)


def explain(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first fault that pydantic found, as one sentence with OpenAI's spelling of its place (`messages[0].role`)."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return ApiError(f"The body is not valid JSON: {problem.get('ctx', {}).get('error', problem['msg'])}", remedy="Send a JSON object.")
    location = [part for part in problem["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {message}" if param else f"The body cannot be read: {message}", param=param or None)

"""The HTTP application: routes, the error envelope, the key, and an id on every answer.

Without a key only requests addressed to this machine by a loopback name are answered: a web page that points its own host
name at 127.0.0.1 could otherwise read what a private model writes.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import secrets
from collections.abc import AsyncIterator
from hmac import compare_digest

from fastapi import FastAPI, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from giong.evaluation.compare import Comparison
from giong.server import errors
from giong.server.backend import Backend
from giong.server.routes import advise, chat, compare, home, models, texts
from giong.workspace import Project

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""


def create_app(backend: Backend, api_key: str | None, project: Project | None = None) -> FastAPI:
    """The API over `backend`, which is opened and closed with the application, and the pages of `project`; with `api_key`, clients must
    send it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.open()
        yield
        await backend.close()

    app = FastAPI(title="giong", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.backend = backend
    app.state.project, app.state.comparison, app.state.has_home = project, None, True
    errors.install(app)
    app.include_router(chat.router, prefix="/v1")
    app.include_router(models.router, prefix="/v1")
    app.include_router(texts.router, prefix="/v1")
    if project:
        for pages in (home, compare, advise):
            app.include_router(pages.router)

    @app.get("/health")
    async def health() -> dict[str, str]:
        backend.check()
        return {"status": "ok"}

    app.add_middleware(Doorkeeper, api_key=api_key)
    return app


def create_compare_app(comparison: Comparison) -> FastAPI:
    """The page of a blind comparison alone, for this machine alone: no model is behind it."""
    app = FastAPI(title="giong compare", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.project, app.state.comparison, app.state.has_home = comparison.project, comparison, False
    errors.install(app)
    app.include_router(compare.router)
    app.add_middleware(Doorkeeper, api_key=None)
    return app


class Doorkeeper:
    """Gives every request an id and lets in only those with the key (or, where there is none, from this machine)."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app, self._api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[errors.REQUEST_ID] = "req_" + secrets.token_hex(12)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        refused = self._refuse(scope)
        if refused:
            # A browser asks for the key by itself; programs that call the API are not asked twice.
            asks = {} if scope["path"].startswith("/v1/") or refused.status != 401 else {"www-authenticate": 'Basic realm="giong"'}
            await errors.error_response(refused, Request(scope), asks)(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)

    def _refuse(self, scope: Scope) -> errors.ApiError | None:
        headers = Headers(scope=scope)
        if self._api_key is None:
            if is_loopback(_host_name(headers.get("host", ""))):
                return None
            return errors.ApiError(
                f"This server has no key and answers only to loopback names, not to {headers.get('host', '')!r}", 403,
                remedy="Use http://127.0.0.1, or set serve.api_key_env.",
            )  # fmt: skip
        if scope["path"] in OPEN_PATHS:
            return None
        given = _key_of(headers)
        if given and compare_digest(given.encode(), self._api_key.encode()):
            return None
        message = "The API key is wrong" if given else "No API key was sent"
        return errors.ApiError(
            message, 401, code="invalid_api_key", remedy="Send the key that the server was started with as a bearer token."
        )


def _key_of(headers: Headers) -> str:
    """The key as clients of OpenAI (bearer token), of Azure (`api-key`) and browsers (the password, whatever the name) send it."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() != "basic":
        return headers.get("api-key", "")
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine and no other can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_name(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]

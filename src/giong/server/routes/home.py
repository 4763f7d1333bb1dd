"""GET /: the server's first page, with its models and a link to every other page."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from giong.server import rendering
from giong.server.words import WORDS

router = APIRouter()


@router.get("/")
async def page(request: Request) -> HTMLResponse:
    """The page as the server is at this moment."""
    models = [entry["name"] for entry in await request.app.state.backend.models()]
    return rendering.page(request, "home", WORDS, models=models, api=f"{request.base_url}v1")

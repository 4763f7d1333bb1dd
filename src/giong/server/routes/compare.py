"""The page of a blind comparison: GET /compare, GET /compare/next for a rater's pair, POST /compare/votes.

What the browser gets says nothing about the arms: a pair is its texts and an id that is a hash. Votes are sent as JSON, which no
other site's page can make a browser send here unasked.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict

from giong.contracts import request_text
from giong.evaluation.compare import Comparison
from giong.evaluation.compare.words import WORDS, words_for
from giong.server.errors import ApiError

router = APIRouter()
PAGES = Path(__file__).parents[1] / "pages"


class Ballot(BaseModel):
    """A choice, as the page sends it; `language` says which consent text was shown."""

    model_config = ConfigDict(extra="forbid")

    rater: str
    pair: str
    choice: Literal["left", "right", "tie"]
    language: Literal["en", "vi"]


@router.get("/compare")
async def page(request: Request) -> HTMLResponse:
    """The page itself: it loads nothing else, and the policy forbids it to."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    comparison: Comparison = request.app.state.comparison
    nonce = secrets.token_urlsafe(16)
    environment = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)
    words = {language: words_for(language, comparison.mode, comparison.author) for language in WORDS}
    source = environment.get_template("compare.html").render(words=words, nonce=nonce, project=comparison.project.root.name)
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(source, headers={"content-security-policy": policy, "cache-control": "no-store", "referrer-policy": "no-referrer"})


@router.get("/compare/next")
async def next_pair(rater: str, request: Request) -> dict[str, Any]:
    """The first pair that this rater has not judged, or none at the end."""
    return _next(request.app.state.comparison, rater)


@router.post("/compare/votes")
async def vote(ballot: Ballot, request: Request) -> dict[str, Any]:
    """Record a choice; the answer is the next pair."""
    comparison: Comparison = request.app.state.comparison
    pair = next((pair for pair in comparison.all_for(ballot.rater) if pair.id == ballot.pair), None)
    if pair is None:
        raise ApiError(f"There is no pair {ballot.pair!r}", 404, param="pair", remedy="Load the page again.")
    comparison.vote(pair, ballot.choice, rater=ballot.rater, consent=WORDS[ballot.language]["consent"])
    return _next(comparison, ballot.rater)


def _next(comparison: Comparison, rater: str) -> dict[str, Any]:
    total, remaining = len(comparison.all_for(rater)), comparison.remaining(rater)
    pair = remaining[0] if remaining else None
    shown = pair and {"id": pair.id, "request": request_text(pair.messages), "left": pair.texts[0], "right": pair.texts[1]}
    return {"pair": shown, "number": total - len(remaining) + bool(pair), "total": total}

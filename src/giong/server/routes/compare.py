"""The page of a blind comparison: GET /compare, GET /compare/next for a rater's pair, POST /compare/votes.

What the browser gets says nothing about the arms: a pair is its texts and an id that is sealed with a secret of this process, for one
rater. Votes are sent as JSON, which no other site's page can make a browser send here unasked.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict

from giong.contracts import request_text
from giong.evaluation.compare import Comparison
from giong.evaluation.compare.pairs import Pair
from giong.evaluation.compare.votes import check_rater
from giong.evaluation.compare.words import WORDS, words_for
from giong.server import rendering
from giong.server.errors import ApiError

router = APIRouter()
SECRET = secrets.token_bytes(32)


class Ballot(BaseModel):
    """A choice, as the page sends it; `language` says which consent text was shown."""

    model_config = ConfigDict(extra="forbid")

    rater: str
    pair: str
    choice: Literal["left", "right", "tie"]
    language: Literal["en", "vi"]


@router.get("/compare")
def page(request: Request) -> HTMLResponse:
    """The page itself. The answers are read anew, where it is not the page of one comparison alone."""
    if request.app.state.has_home:
        request.app.state.comparison = Comparison(request.app.state.project)
    comparison: Comparison = request.app.state.comparison
    return rendering.page(request, "compare", {language: words_for(language, comparison.mode, comparison.author) for language in WORDS})


@router.get("/compare/next")
async def next_pair(rater: str, request: Request) -> dict[str, Any]:
    """The first pair that this rater has not judged, or none at the end."""
    return _next(_comparison(request), rater)


@router.post("/compare/votes")
async def vote(ballot: Ballot, request: Request) -> dict[str, Any]:
    """Record a choice; the answer is the next pair."""
    comparison = _comparison(request)
    pair = next((pair for pair in comparison.all_for(ballot.rater) if sealed(pair, ballot.rater) == ballot.pair), None)
    if pair is None:
        raise ApiError(f"There is no pair {ballot.pair!r}", 404, param="pair", remedy="Load the page again.")
    comparison.vote(pair, ballot.choice, rater=ballot.rater, consent=WORDS[ballot.language]["consent"])
    return _next(comparison, ballot.rater)


def sealed(pair: Pair, rater: str) -> str:
    """What stands for a pair in the browser of one rater. The pair's own id is a plain hash, which whoever guesses the arms can check."""
    return hmac.new(SECRET, f"{check_rater(rater)}\n{pair.id}".encode(), "sha256").hexdigest()


def _comparison(request: Request) -> Comparison:
    state = request.app.state
    if state.comparison is None:
        state.comparison = Comparison(state.project)
    return state.comparison


def _next(comparison: Comparison, rater: str) -> dict[str, Any]:
    total, remaining = len(comparison.all_for(rater)), comparison.remaining(rater)
    pair = remaining[0] if remaining else None
    shown = pair and {"id": sealed(pair, rater), "request": request_text(pair.messages), "left": pair.texts[0], "right": pair.texts[1]}
    return {"pair": shown, "number": total - len(remaining) + bool(pair), "total": total}

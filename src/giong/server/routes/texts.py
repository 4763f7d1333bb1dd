"""POST /v1/embeddings in OpenAI's shape, and POST /v1/classify in vLLM's: what a model makes of whole texts."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from giong.server import wire
from giong.server.backend import Judged
from giong.server.errors import ApiError
from giong.server.routes.chat import CLIENT_CLOSED_REQUEST, unless_gone

router = APIRouter()
ROUTES = {"embed": "/v1/embeddings", "classify": "/v1/classify"}


@router.post("/embeddings")
async def embed(body: wire.TextsRequest, request: Request) -> Response:
    """Turn texts into vectors of length 1."""
    return await _answer(body, request, "embed")


@router.post("/classify")
async def classify(body: wire.TextsRequest, request: Request) -> Response:
    """Label texts, or give each its value."""
    return await _answer(body, request, "classify")


async def _answer(body: wire.TextsRequest, request: Request, task: str) -> Response:
    try:
        judged = await unless_gone(request.app.state.backend.texts(body.model, body.input), request)
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if judged.task != task:
        raise ApiError(
            f"The model {body.model!r} was made for task {judged.task}", param="model", remedy=f"Ask {ROUTES[judged.task]} instead."
        )
    made = _embedding if task == "embed" else _label
    used = {"prompt_tokens": judged.num_prompt_tokens, "total_tokens": judged.num_prompt_tokens}
    data = [{"index": index, **made(body, judged, output)} for index, output in enumerate(judged.outputs)]
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": used})


def _embedding(body: wire.TextsRequest, judged: Judged, output: list[float]) -> dict[str, Any]:
    if body.dimensions not in (None, len(output)):
        raise ApiError(f"This model's vectors have {len(output)} dimensions and cannot be cut to {body.dimensions}", param="dimensions")
    as_base64 = body.encoding_format == "base64"
    embedding = base64.b64encode(np.array(output, dtype="<f4").tobytes()).decode() if as_base64 else output
    return {"object": "embedding", "embedding": embedding}


def _label(body: wire.TextsRequest, judged: Judged, output: list[float]) -> dict[str, Any]:
    if judged.problem == "regression":
        return {"value": output[0]}
    shares = {"probs": output, "num_classes": len(output)}
    if judged.problem == "multi_label_classification":
        return {"labels": [name for name, share in zip(judged.labels, output) if share > 0.5], **shares}
    return {"label": judged.labels[output.index(max(output))], **shares}

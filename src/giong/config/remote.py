"""How to reach a model over an OpenAI-compatible API, and what it charges. Used for teachers and for remote arms."""

from __future__ import annotations

from pydantic import Field

from giong.config.base import Section


class RemoteModelConfig(Section):
    base_url: str
    """The API's root, for example https://api.openai.com/v1 or http://127.0.0.1:8000/v1."""
    model: str
    """The model's name at that API."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself never stands in a file."""
    input_usd_per_million_tokens: float = Field(default=0.0, ge=0)
    """Price of the request's tokens; 0 for a model of your own."""
    output_usd_per_million_tokens: float = Field(default=0.0, ge=0)
    """Price of the answer's tokens."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """How long to wait for one answer."""
    max_retries: int = Field(default=4, ge=0)
    """How often a request is repeated after a time-out, 429 or 5xx, with exponential back-off."""
    concurrency: int = Field(default=8, ge=1)
    """Requests under way at once."""

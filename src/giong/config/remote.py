"""How to reach a model over an OpenAI-compatible API, and what it charges: to be asked (teachers, judges, remote arms) or to be trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from giong.config.base import Section


class EndpointConfig(Section):
    base_url: str
    """The API's root, for example https://api.openai.com/v1 or http://127.0.0.1:8000/v1."""
    model: str
    """The model's name at that API."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself never stands in a file."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """How long to wait for one answer."""
    max_retries: int = Field(default=4, ge=0)
    """How often a request is repeated after a time-out, 429 or 5xx, with exponential back-off."""


class RemoteModelConfig(EndpointConfig):
    input_usd_per_million_tokens: float = Field(default=0.0, ge=0)
    """Price of the request's tokens; 0 for a model of your own."""
    output_usd_per_million_tokens: float = Field(default=0.0, ge=0)
    """Price of the answer's tokens."""
    concurrency: int = Field(default=8, ge=1)
    """Requests under way at once."""


class RemoteTrainingConfig(EndpointConfig):
    provider: Literal["openai"] = "openai"
    """Whose API it is: `openai` is OpenAI's fine-tuning API (files and jobs), which other servers speak too."""
    training_usd_per_million_tokens: float = Field(ge=0, allow_inf_nan=False)
    """Price of the training tokens, each counted once per epoch; 0 for a server of your own. It has no default, because the spend cap
    rests on it."""
    n_epochs: int = Field(default=3, ge=1, le=50)
    """Passes over the rows of each job. Never left to the provider, whose choice changes with the number of rows."""
    batch_size: int | None = Field(default=None, ge=1, le=256)
    """Rows per step; null leaves it to the provider."""
    learning_rate_multiplier: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Factor on the provider's own learning rate; null leaves it to the provider."""
    max_wait_seconds: float = Field(default=86400.0, gt=0)
    """How long to wait for all jobs together. They go on after that, and the same command waits for them again."""

"""Sections `export` and `serve`: what leaves the project, and where it is answered from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from giong.config.base import Section


class ExportConfig(Section):
    formats: list[Literal["adapter", "merged"]] | None = None
    """`adapter` is PEFT's format (LoRA alone has one); `merged` is a plain model folder. By default every format that the model has."""
    output_dir: str = "exports"
    """Folder for exports, inside the project."""
    accept_failed_gates: list[str] = []
    """Names of gates that the tuned model may have failed and is exported all the same (`overlap`, `end of turn`, ...)."""


class ServeConfig(Section):
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key clients must send."""
    max_batch_requests: int = Field(default=8, ge=1)
    """Requests decoded together."""

"""Pages: one layout, words in English and Vietnamese, and a policy under which a page loads nothing but itself.

Nothing is built beforehand: a page is a template with its script in it, so that there is no second language to install and no file to
fetch, and whatever stands in a text is escaped.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse

from giong.server.words import WORDS

TEMPLATES = Path(__file__).parent / "pages"


def page(request: Request, name: str, words: Mapping[str, Mapping[str, str]], *, status: int = 200, **values: Any) -> HTMLResponse:
    """The template of that name; `words` come on top of those that all pages share."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    nonce, state = secrets.token_urlsafe(16), request.app.state
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    values |= {"words": {language: {**WORDS[language], **own} for language, own in words.items()}, "nonce": nonce}
    source = environment.get_template(f"{name}.html").render(values, project=state.project.root.name, has_home=state.has_home)
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {"content-security-policy": policy, "cache-control": "no-store", "referrer-policy": "no-referrer"}
    return HTMLResponse(source, status, headers)

"""JSON schemas that answers are held to: `evaluation.json_schema`, and what rows in OpenAI's format ask for.

The library `jsonschema` judges (extra `schema`). It may not fetch what a `$ref` names elsewhere: a schema is whole, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from giong.errors import ConfigError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from referencing import Resource
    from referencing._core import Resolver


def read_schema(value: str | Mapping[str, Any] | None, root: Path) -> dict[str, Any] | None:
    """The schema of the setting, a mapping or a file relative to `root`. Raises ConfigError for one that is none."""
    if not isinstance(value, str):
        return None if value is None else schema_of(value)
    path = root / Path(value).expanduser()
    try:
        return schema_of(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        reason = f"{error.strerror}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ConfigError(
        f"The file {value!r} is no JSON schema: {reason}", place="evaluation.json_schema", remedy="Correct the path or the file."
    )


def schema_of(value: Any) -> dict[str, Any]:
    """The schema itself, also out of OpenAI's wrapping (`{"type": "json_schema", "json_schema": {"schema": ...}}`), checked.

    Raises ValueError saying what is wrong with it.
    """
    if isinstance(value, Mapping) and value.get("type") == "json_schema":
        value = value.get("json_schema")
        value = value.get("schema") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise ValueError(f"a JSON schema is an object, not {value!r}")
    validator_for(value)
    return dict(value)


def validator_for(schema: Mapping[str, Any]) -> Validator:
    """What judges values by this schema (2020-12 where it names no other draft), formats such as `date` included. Raises ValueError."""
    try:
        from jsonschema import SchemaError, validators
        from jsonschema_specifications import REGISTRY
        from referencing import Resource
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import DRAFT202012
    except ImportError:
        raise ValueError("holding answers to a JSON schema needs the package jsonschema: pip install 'giong[schema]'") from None

    kind = validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a valid JSON schema: {clipped(error.message)} (at {error.json_path})") from None
    whole = Resource.from_contents(schema, default_specification=DRAFT202012)
    try:
        _follow(REGISTRY.resolver_with_root(whole), whole)
    except Unresolvable as error:
        raise ValueError(f"the JSON schema refers to {error.ref!r}, which is not in it: write it under $defs") from None
    return kind(schema, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)


def fault(validator: Validator, value: Any) -> str:
    """The first thing that is wrong with a value, in words; empty where nothing is."""
    from jsonschema.exceptions import best_match

    error = best_match(validator.iter_errors(value))
    return f"{clipped(error.message)} (at {error.json_path})" if error else ""


def clipped(text: str, limit: int = 100) -> str:
    """The text on one line, shortened in its middle: messages of the library hold the whole value."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _follow(resolver: Resolver[Any], resource: Resource[Any]) -> None:
    """Look every `$ref` up; raises Unresolvable where one leads nowhere."""
    if isinstance(resource.contents, Mapping) and isinstance(resource.contents.get("$ref"), str):
        resolver.lookup(resource.contents["$ref"])
    for inner in resource.subresources():
        _follow(resolver.in_subresource(inner), inner)

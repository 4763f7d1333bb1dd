"""The gate for structured answers: present only where a schema asks for them, or where the author's own answers are JSON.

Without a schema what is valid is read off the author's answers: the keys that all of them have, and the types that each key takes,
because who has only examples has no schema.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from giong.config.json_schema import fault, validator_for
from giong.contracts import Example
from giong.evaluation.gates import THRESHOLDS, Gate
from giong.evaluation.metrics.intervals import wilson

MISSING = object()
NUM_NAMED = 3
"""Invalid replies that the gate names."""


def parsed(text: str) -> Any:
    """The value that a text is, or MISSING: prose around it, a code fence or NaN is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return MISSING


class AnswerShape:
    """What all of the given values have in common: top-level keys with their types, or that they are lists."""

    def __init__(self, values: Sequence[Any]) -> None:
        objects = [value for value in values if isinstance(value, dict)]
        self.kinds = {type(value) for value in values}
        self.required = set.intersection(*map(set, objects)) if objects else set()
        self.types: Mapping[str, set[type]] = defaultdict(set)
        for value in objects:
            for key, part in value.items():
                self.types[key].add(_type(part))

    def fault(self, value: Any) -> str:
        """Why a parsed reply is not of this shape; empty where it is."""
        if value is MISSING:
            return "no JSON"
        if type(value) not in self.kinds:
            return "another kind of JSON"
        if not isinstance(value, dict):
            return ""
        if missing := self.required - set(value):
            return f"without {sorted(missing)[0]!r}"
        if unknown := [key for key in value if key not in self.types]:
            return f"with an unknown key {unknown[0]!r}"
        wrong = [key for key, part in value.items() if _type(part) not in self.types[key]]
        return f"with a wrong type of {wrong[0]!r}" if wrong else ""


def asks_for_json(answers: Sequence[str]) -> bool:
    """Whether at least half of the author's answers are objects or lists of JSON."""
    return 2 * sum(1 for answer in answers if isinstance(parsed(answer), (dict, list))) >= max(len(answers), 1)


class Format:
    """What the answers to some requests have to be: valid by the request's own schema or the common one, else of the author's shape.

    False where nothing is asked for.
    """

    def __init__(self, examples: Sequence[Example], json_schema: Mapping[str, Any] | None = None) -> None:
        self.names = [example.id for example in examples]
        schemas = [json_schema if example.json_schema is None else example.json_schema for example in examples]
        self.validators = {place: validator_for(schema) for place, schema in enumerate(schemas) if schema is not None}
        free = {place: example.answer for place, example in enumerate(examples) if place not in self.validators}
        own = {place: parsed(answer) for place, answer in free.items()} if asks_for_json(list(free.values())) else {}
        self.own = {place: value for place, value in own.items() if isinstance(value, (dict, list))}
        self.shape = AnswerShape(list(self.own.values()))

    def __bool__(self) -> bool:
        return bool(self.validators or self.own)

    def fault(self, place: int, value: Any) -> str:
        """Why a parsed reply to the request at this place is not valid; empty where it is."""
        if place in self.own:
            return self.shape.fault(value)
        return "no JSON" if value is MISSING else fault(self.validators[place], value)

    def gate(self, texts: Sequence[str]) -> Gate:
        """Share of valid replies, the first that are not by name; for tool calls, how often the same tool as the author's."""
        limit = THRESHOLDS.valid_format_share
        values = {place: parsed(texts[place]) for place in sorted({*self.validators, *self.own})}
        faults = {place: found for place, value in values.items() if (found := self.fault(place, value))}
        share = wilson(len(values) - len(faults), len(values))
        explanation = f"{len(values) - len(faults)} of {len(values)} replies are valid"
        if faults:
            named = "; ".join(f"{self.names[place]}: {reason}" for place, reason in list(faults.items())[:NUM_NAMED])
            explanation += f". Not valid: {named}" + (f"; and {len(faults) - NUM_NAMED} more" if len(faults) > NUM_NAMED else "")
        explanation += "."
        if self.own and self.shape.required >= {"name", "arguments"}:
            same = sum(values[place]["name"] == own["name"] for place, own in self.own.items() if place not in faults)
            explanation += f" {same} of {len(self.own)} call the author's tool."
        asked = [*(["are valid by their JSON schema"] if self.validators else [])]
        asked += ["are JSON with the keys and types of the author's answers"] if self.own else []
        status = "pass" if share.point >= limit else "fail"
        return Gate("format", share.point, f"at least {limit:.0%} of the replies {' or '.join(asked)}", status, explanation, share)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _type(value: Any) -> type:
    # 1 and 1.0 are one kind of number to whoever reads the file.
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)

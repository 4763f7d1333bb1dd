"""The gate for structured answers: present only where the author's own answers are JSON.

What is valid is read off the author's answers: the keys that all of them have, and the types that each key takes. A schema of one's
own would say it better and nobody who has only examples has one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from giong.evaluation.gates import THRESHOLDS, Gate
from giong.evaluation.metrics.intervals import wilson

MISSING = object()


def parsed(text: str) -> Any:
    """The object or list that a text is, or MISSING: prose around it, or a code fence, is not JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return MISSING
    return value if isinstance(value, (dict, list)) else MISSING


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
    """Whether at least half of the author's answers are JSON."""
    return 2 * sum(1 for answer in answers if parsed(answer) is not MISSING) >= max(len(answers), 1)


def valid_format(texts: Sequence[str], answers: Sequence[str]) -> Gate:
    """Share of replies of the author's shape, among the requests that he answers in JSON; for tool calls, how often the same tool."""
    limits = THRESHOLDS
    pairs = [(parsed(text), own) for text, answer in zip(texts, answers, strict=True) if (own := parsed(answer)) is not MISSING]
    shape = AnswerShape([own for _, own in pairs])
    faults = [shape.fault(value) for value, _ in pairs]
    num_valid = faults.count("")
    share = wilson(num_valid, len(pairs))
    explanation = f"{num_valid} of {len(pairs)} replies are valid"
    explanation += f" (first fault: {next(filter(None, faults))})." if num_valid < len(pairs) else "."
    if shape.required >= {"name", "arguments"}:
        same = sum(1 for (value, own), fault in zip(pairs, faults) if not fault and value["name"] == own["name"])
        explanation += f" {same} of {len(pairs)} call the author's tool."
    text = f"at least {limits.valid_format_share:.0%} of the replies are JSON with the keys and types of the author's answers"
    status = "pass" if share.point >= limits.valid_format_share else "fail"
    return Gate("format", share.point, text, status, explanation, share)


def _type(value: Any) -> type:
    # 1 and 1.0 are one kind of number to whoever reads the file.
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)

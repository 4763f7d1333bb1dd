"""Change single settings in the text of a giong.yaml: everything else, comments too, stays as it was.

The text is changed at the place that the YAML parser names and then read again; where the result is not exactly the old
settings with the new values, nothing is written and the user gets the lines to put in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import yaml

from giong.errors import ConfigError


def settings_yaml(settings: Mapping[str, Any]) -> str:
    """Dotted settings as the lines of a giong.yaml."""
    return yaml.safe_dump(_nested({}, settings), sort_keys=False, allow_unicode=True)


def with_written(text: str, settings: Mapping[str, Any], *, place: str = "") -> str:
    """The text of a giong.yaml with dotted settings (`section.name`) put in.

    Raises ConfigError, with the lines to put in by hand, where the text is laid out so that it cannot be done safely.
    """
    changed = text
    for name, value in settings.items():
        section, _, key = name.partition(".")
        changed = _with_setting(changed, section, key, value)
    try:
        as_wished = yaml.safe_load(changed) == _nested(yaml.safe_load(text) or {}, settings)
    except yaml.YAMLError:
        as_wished = False
    if not as_wished:
        lines = settings_yaml(settings).rstrip().replace("\n", "; ")
        raise ConfigError("giong.yaml is laid out in a way that is not edited", place=place, remedy=f"Put in yourself: {lines}")
    return changed


def _nested(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(values))
    for name, value in settings.items():
        section, _, key = name.partition(".")
        changed[section] = {**(changed.get(section) or {}), key: value}
    return changed


def _with_setting(text: str, section: str, key: str, value: Any) -> str:
    line_end = "\r\n" if "\r\n" in text else "\n"
    # A list stays on its line: [a, b].
    line = yaml.safe_dump(
        {key: value}, allow_unicode=True, width=10_000, default_flow_style=None if isinstance(value, list) else False
    ).strip()
    written = line.partition(": ")[2]
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = _child(root, section)
    if found is None:
        gap = "" if not text or text.endswith("\n") else line_end
        return f"{text}{gap}{section}:{line_end}  {line}{line_end}"
    head, body = found
    if not isinstance(body, yaml.MappingNode):
        # A section whose every line is commented out.
        return _insert_line(text, head.start_mark.line + 1, f"  {line}", line_end)
    entry = _child(body, key)
    if entry is not None:
        start, end = entry[1].start_mark.index, entry[1].end_mark.index
        return f"{text[:start]}{written}{text[end:]}"
    if not body.value:
        return f"{text[: body.start_mark.index]}{{{line}}}{text[body.end_mark.index :]}"
    first = body.value[0][0].start_mark
    if body.flow_style:
        return f"{text[: first.index]}{line}, {text[first.index :]}"
    return _insert_line(text, head.start_mark.line + 1, f"{' ' * first.column}{line}", line_end)


def _child(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next(((name, value) for name, value in pairs if name.value == key), None)


def _insert_line(text: str, number: int, line: str, line_end: str) -> str:
    lines = text.splitlines(keepends=True)
    if number == len(lines) and lines and not lines[-1].endswith("\n"):
        lines[-1] += line_end
    lines.insert(number, line + line_end)
    return "".join(lines)

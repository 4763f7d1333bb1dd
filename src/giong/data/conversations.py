"""Chat files in OpenAI's fine-tuning format: one conversation per line, its assistant's turns written by the author.

One decision a reader may question: nothing is cleaned or cut here. A turn is an answer to the turns before it, and is learned byte by
byte; what cannot be used is named with its line and left out whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from giong.config.json_schema import schema_of
from giong.contracts import SPARSE, Message, Role
from giong.data.importers.found import Unusable, decode
from giong.data.importers.report import ImportEntry
from giong.data.words import count_words
from giong.errors import DataError

ROLES = get_args(Role)
KNOWN = {"messages", "tools", "parallel_tool_calls"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of a chat file; `place` is file:line. The last turn is the assistant's; `json_schema` is that of `response_format`."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    place: str = ""
    json_schema: dict[str, Any] | None = field(default=None, metadata=SPARSE)

    @property
    def answer(self) -> str:
        """What a test compares with: the author's last turn; empty where tools take part or that turn is not to be learned."""
        last = self.messages[-1]
        uses_tools = self.tools or any(message.tool_calls or message.role == "tool" for message in self.messages)
        return "" if uses_tools or not last.weight else last.content


class _BadRow(ValueError):
    """What is wrong with a row, in words."""


def read_conversations(path: Path, name: str = "") -> tuple[list[Conversation], list[ImportEntry]]:
    """The conversations of a file, and one entry for every line; ids begin with `name`, the file's own by default.

    Raises DataError for a file that is not there or holds none.
    """
    if not path.is_file():
        raise DataError(f"There is no chat file {path.name!r}", place=str(path), remedy="Correct data.conversations in giong.yaml.")
    decoded = decode(path.read_bytes())
    if isinstance(decoded, Unusable):
        raise DataError(f"The chat file cannot be read: {decoded.reason}", place=str(path), remedy="Save it as UTF-8.")
    found: list[Conversation] = []
    entries: list[ImportEntry] = []
    for number, line in enumerate(decoded[0].split("\n"), start=1):
        if not line.strip():
            continue
        place, identity = f"{path}:{number}", f"{name or path.name}:{number}"
        try:
            conversation, note = parse_conversation(line, identity, place)
        except _BadRow as problem:
            entries.append(ImportEntry(place, "dropped", str(problem)))
            continue
        found.append(conversation)
        words = sum(count_words(message.content) for message in conversation.messages if message.role == "assistant")
        entries.append(ImportEntry(place, "kept", note, words, identity))
    if not found:
        first = f": line {entries[0].place.rpartition(':')[2]}: {entries[0].reason}" if entries else ""
        raise DataError(
            f"No line of the chat file is a usable conversation{first}", place=str(path),
            remedy='Each line has to be like {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.',
        )  # fmt: skip
    return found, entries


def parse_conversation(line: str, name: str, place: str) -> tuple[Conversation, str]:
    """The conversation and a note on what was passed over. Raises ValueError saying what is wrong."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadRow(f"not valid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise _BadRow("no list `messages`")
    if "functions" in row:
        raise _BadRow("`functions` is the old spelling; write `tools`")
    messages = tuple(_message(value, f"messages[{index}]") for index, value in enumerate(row["messages"]))
    if messages[-1].role != "assistant":
        raise _BadRow(f"the last message is the {messages[-1].role}'s, and there is no answer to it")
    if not any(message.weight for message in messages if message.role == "assistant"):
        raise _BadRow("every assistant message has weight 0: nothing is left to learn")
    schema = _json_schema(row.get("response_format"))
    passed_over = sorted(set(row) - KNOWN - ({"response_format"} if schema else set()))
    conversation = Conversation(name, messages, _tools(row.get("tools") or []), place, schema)
    return conversation, f"not used: {', '.join(passed_over)}" if passed_over else ""


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise _BadRow(f"{where} is no object")
    role = {"developer": "system"}.get(value.get("role"), value.get("role"))
    if role not in ROLES:
        raise _BadRow(f"{where}.role is {role!r}; known are {', '.join(ROLES)}")
    if value.get("function_call"):
        raise _BadRow(f"{where}.function_call is the old spelling; write `tool_calls`")
    calls = _tool_calls(value.get("tool_calls") or [], f"{where}.tool_calls")
    if calls and role != "assistant":
        raise _BadRow(f"{where}.tool_calls: only the assistant calls tools")
    content = _text(value.get("content"), f"{where}.content")
    if not content.strip() and not calls and role != "tool":
        raise _BadRow(f"{where}.content is empty")
    weight = value.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _BadRow(f"{where}.weight is {weight!r}, and can be 0 or 1")
    if "weight" in value and role != "assistant":
        raise _BadRow(f"{where}.weight: only the assistant's messages carry loss")
    identity, name = (value.get(key) or "" for key in ("tool_call_id", "name"))
    if not isinstance(identity, str) or not isinstance(name, str):
        raise _BadRow(f"{where}: tool_call_id and name have to be text")
    return Message(role, content, float(weight), calls, identity, name)


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise _BadRow(f"{where} holds something else than text")


def _tool_calls(calls: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Calls with their arguments as an object, which is what chat templates expect; OpenAI writes them as a text of JSON."""
    if not isinstance(calls, list):
        raise _BadRow(f"{where} is no list")
    made = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _BadRow(f"{where}[{index}] has no function with a name")
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except json.JSONDecodeError:
            raise _BadRow(f"{where}[{index}].function.arguments is not valid JSON") from None
        if not isinstance(arguments, Mapping):
            raise _BadRow(f"{where}[{index}].function.arguments is no object")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({"type": "function", **identity, "function": {"name": function["name"], "arguments": dict(arguments)}})
    return tuple(made)


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(tools, list):
        raise _BadRow("`tools` is no list")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _BadRow(f"tools[{index}] has no function with a name")
    return tuple(tools)


def _json_schema(asked: Any) -> dict[str, Any] | None:
    """What `response_format` asks for; None where it asks for nothing, and where nothing is installed that could judge by it."""
    if not isinstance(asked, Mapping) or asked.get("type") not in ("json_schema", "json_object") or find_spec("jsonschema") is None:
        return None
    try:
        return schema_of(asked) if asked["type"] == "json_schema" else {"type": "object"}
    except ValueError as error:
        raise _BadRow(f"response_format: {error}") from None


def conversations_from(rows: Sequence[Mapping[str, Any]]) -> list[Conversation]:
    """Inverse of writing conversations to a file of the project."""
    return [Conversation(**{**row, "messages": tuple(Message(**message) for message in row["messages"])}) for row in rows]

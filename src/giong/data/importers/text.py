"""Reads .txt and .md: front matter for title and date, then only the author's prose.

Markdown is parsed and not searched by pattern: code, quotations, pictures, tables, raw HTML and headings go, and of the
rest the words and punctuation stay while the marks (emphasis, link targets, list bullets) go. In plain text lines that
begin with ">" are quotations, and lines broken by an editor at a fixed width are joined.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from giong.config.data import DataConfig
from giong.data.importers.found import Found, Unusable, date_in_name, decode, normalise_date
from giong.data.words import is_unspaced

if TYPE_CHECKING:
    from markdown_it.token import Token

_YAML_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)??(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_TOML_FRONT_MATTER = re.compile(r"\A\+\+\+[ \t]*\r?\n(.*?\r?\n)??\+\+\+[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FOOTNOTE_MARK = re.compile(r"\[\^[^\]\s]+\]:?")
_DROPPED_BLOCKS = frozenset({"fence", "code_block", "html_block", "hr"})
_DROPPED_CONTAINERS = frozenset({"blockquote", "table", "heading"})
# Editors wrap between these widths; shorter lines are verse, addresses or lists, whose breaks are the author's.
MIN_WRAP_WIDTH, MAX_WRAP_WIDTH = 50, 100


def read_markdown(path: Path, data: bytes, config: DataConfig) -> list[Found | Unusable]:
    """A .md file as one piece of writing."""
    return _read(path, data, is_markdown=True)


def read_text(path: Path, data: bytes, config: DataConfig) -> list[Found | Unusable]:
    """A .txt file as one piece of writing."""
    return _read(path, data, is_markdown=False)


def _read(path: Path, data: bytes, *, is_markdown: bool) -> list[Found | Unusable]:
    decoded = decode(data)
    if isinstance(decoded, Unusable):
        return [decoded]
    text, encoding_note = decoded
    values, body, front_note = split_front_matter(text)
    prose, heading = markdown_prose(body) if is_markdown else (plain_prose(body), "")
    date, date_note = normalise_date(values.get("date"))
    return [
        Found(
            prose, str(values.get("title") or heading or path.stem), date or date_in_name(path.name),
            note="; ".join(note for note in (encoding_note, front_note, date_note) if note),
        )
    ]  # fmt: skip


def split_front_matter(text: str) -> tuple[dict[str, Any], str, str]:
    """The settings between two `---` (YAML) or `+++` (TOML) lines at the very start, the text after them, and a note where they cannot
    be read."""
    if toml := _TOML_FRONT_MATTER.match(text):
        match, name = toml, "TOML"
    elif yaml_ := _YAML_FRONT_MATTER.match(text):
        match, name = yaml_, "YAML"
    else:
        return {}, text, ""
    try:
        written = match.group(1) or ""
        values = tomllib.loads(written.replace("\r\n", "\n")) if toml else yaml.safe_load(written)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else _line_of(str(error))
        where = f" (line {line + 1})" if line else ""
        return {}, text[match.end() :], f"front matter is not valid {name}{where}: title and date not read"
    if values is None:
        return {}, text[match.end() :], ""
    if not isinstance(values, dict):
        # Two rules around prose are no front matter.
        return {}, text, ""
    return {str(key).lower(): value for key, value in values.items()}, text[match.end() :], ""


def _line_of(message: str) -> int:
    """The line that tomllib's message names, 0 without one."""
    found = re.search(r"at line (\d+)", message)
    return int(found[1]) if found else 0


def looks_like_markdown(text: str) -> bool:
    """Whether a text has headings, fences or links as only Markdown writes them."""
    return bool(re.search(r"^#{1,6} \S|^(?:```|~~~)|\]\((?:https?:|/|#|\.)", text, re.MULTILINE))


def markdown_prose(text: str) -> tuple[str, str]:
    """The author's paragraphs and list lines, separated by blank lines, and the first top heading."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    blocks: list[str] = []
    heading = ""
    dropped_depth, list_depth = 0, 0
    in_list_block = False
    for index, token in enumerate(tokens):
        container = token.type.removesuffix("_open").removesuffix("_close")
        if container in _DROPPED_CONTAINERS:
            if token.type == "heading_open" and token.tag == "h1" and not heading and not dropped_depth:
                heading = " ".join(_inline_text(tokens[index + 1]).split())
            dropped_depth += token.nesting
        elif container in ("bullet_list", "ordered_list"):
            list_depth += token.nesting
            in_list_block = in_list_block and list_depth > 0
        elif token.type == "inline" and not dropped_depth:
            line = _FOOTNOTE_MARK.sub("", _inline_text(token)).strip()
            if not line:
                continue
            if in_list_block:
                blocks[-1] += "\n" + line
            else:
                blocks.append(line)
            in_list_block = list_depth > 0
        elif token.type in _DROPPED_BLOCKS:
            continue
    return "\n\n".join(blocks), heading


def _inline_text(token: Token) -> str:
    """The words of a paragraph: emphasis and link targets go, the text of links and of inline code stays."""
    parts: list[str] = []
    for child in token.children or ():
        if child.type in ("text", "text_special", "code_inline"):
            parts.append(child.content)
        elif child.type == "hardbreak":
            parts.append("\n")
        elif child.type == "softbreak":
            parts.append("\r")
    # A soft break is a space, except between characters of a script that has none.
    pieces = "".join(parts).split("\r")
    text = pieces[0]
    for piece in pieces[1:]:
        text = _join_lines(text, piece)
    return text


def plain_prose(text: str) -> str:
    """The paragraphs of a plain text without its quoted lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    paragraphs = re.split(r"\n[ \t\u3000]*\n", "\n".join(line for line in text.split("\n") if not line.lstrip().startswith(">")))
    return "\n\n".join(_unwrap(paragraph) for paragraph in paragraphs if paragraph.strip())


def _unwrap(paragraph: str) -> str:
    lines = [line.strip() for line in paragraph.strip().split("\n")]
    widths = [sum(2 if is_unspaced(c) else 1 for c in line) for line in lines]
    if len(lines) == 1 or not all(MIN_WRAP_WIDTH <= width <= MAX_WRAP_WIDTH for width in widths[:-1]) or widths[-1] > MAX_WRAP_WIDTH:
        return "\n".join(lines)
    joined = lines[0]
    for line in lines[1:]:
        joined = _join_lines(joined, line)
    return joined


def _join_lines(left: str, right: str) -> str:
    left, right = left.rstrip(" "), right.lstrip(" ")
    glued = bool(left and right and _is_wide(left[-1]) and _is_wide(right[0]))
    return left + ("" if glued or not left or not right else " ") + right


def _is_wide(character: str) -> bool:
    return is_unspaced(character) or character in "，。！？、；：“”‘’「」『』（）《》【】…—"

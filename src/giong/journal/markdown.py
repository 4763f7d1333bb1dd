"""JOURNAL.md: blocks that giong writes, between marks, in a file that belongs to the person.

A block's opening mark holds the hash of what giong wrote there. Where the hash no longer fits, a person has written into the
block: what they wrote is moved below it, out of the way of the next writing, and never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from giong.workspace import content_hash

HEADINGS = {
    "goal": "Goal", "plan": "Plan", "tried": "What was tried", "learnt": "What was learnt", "next": "What comes next", "notes": "Notes",
}  # fmt: skip
INTRODUCTION = (
    "giong writes the marked blocks; all other text is yours and stays as it is. For programs: `giong journal --json`, or journal.jsonl."
)
END = "<!-- giong: end -->"
BLOCK = re.compile(
    r"^<!-- giong: (?P<name>[a-z]+) (?P<hash>[0-9a-f]{16}) -->\n(?P<body>(?:(?!<!-- giong: ).*\n)*)<!-- giong: end -->$", re.MULTILINE
)


def merged(text: str, blocks: Mapping[str, str], before: Mapping[str, str], *, title: str) -> str:
    """`text` with its blocks written anew; a block that is not there is added at the end under its heading.

    `before` is what the blocks were when giong last wrote them: of an edited block, the lines that are in neither are the person's.
    """
    if text and not text.endswith("\n"):
        text += "\n"
    text = text or f"# {title}\n\n{INTRODUCTION}\n"
    written: set[str] = set()

    def write(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in blocks or name in written:
            return found[0]
        written.add(name)
        known = {*blocks[name].splitlines(), *before[name].splitlines()}
        own = [line for line in found["body"].splitlines() if line not in known] if content_hash(found["body"]) != found["hash"] else []
        return _block(name, blocks[name]) + "".join(f"\n{line}" for line in own)

    text = BLOCK.sub(write, text)
    return text + "".join(f"\n## {heading}\n\n{_block(name, blocks[name])}\n" for name, heading in HEADINGS.items() if name not in written)


def handwritten(text: str) -> str:
    """What stands in the file beside blocks, the introduction and the headings that giong put there."""
    ours = {INTRODUCTION, *(f"## {heading}" for heading in HEADINGS.values())}
    lines = [line for line in BLOCK.sub("", text).splitlines() if line not in ours]
    if lines and lines[0].startswith("# Journal of "):
        lines = lines[1:]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _block(name: str, body: str) -> str:
    return f"<!-- giong: {name} {content_hash(body)} -->\n{body}{END}"

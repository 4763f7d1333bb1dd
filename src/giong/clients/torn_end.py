"""Mends the end of an append-only record that a kill cut short, before it is read.

A whole last row that lacks only its line break is kept, because it was paid for; anything else after the last line break is
cut off, even in the middle of a character.
"""

from __future__ import annotations

import json
from pathlib import Path

from giong.workspace import resource_errors


def mend_torn_end(path: Path) -> None:
    """Make the file end with a whole line; a file that does, or is not there, is left alone."""
    if not path.is_file() or not path.stat().st_size:
        return
    with resource_errors(path), path.open("rb+") as stream:
        content = stream.read()
        if content.endswith(b"\n"):
            return
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            stream.truncate(start)
        else:
            stream.write(b"\n")
